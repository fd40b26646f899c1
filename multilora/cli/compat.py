"""SGLang's flags that this server does not need: which they are and how many values they take, so that a command
line written for SGLang works as it is, with one warning for each.

The names were gathered from the argument parsers of SGLang 0.4.10, 0.5.5, 0.5.12 and 0.5.23. Called by `parser.py`.
"""

# Accepted without a warning, because they ask for what this server always does.
ALWAYS_ON = ("--enable-metrics", "--is-embedding")

# Refused: to ignore them would serve something else than was asked for, unnoticed by clients.
REFUSED = {
    "--config": "configuration files are not read; give the flags themselves",
}

_NO_VALUE = """
    abort-on-priority-when-disabled allow-auto-truncate checkpoint-engine-wait-weights-before-ready
    collect-tokens-histogram constrained-json-disable-any-whitespace dcp-replicate-q-proj debug-cuda-graph
    debug-tensor-dump-prefill-only delete-ckpt-after-loading disable-aiter-allreduce-fusion-in-decode
    disable-aiter-allreduce-fusion-in-prefill disable-attn-tp-gather disable-chunked-prefix-cache
    disable-cuda-graph-padding disable-decode-cuda-graph disable-fast-image-processor
    disable-flashinfer-autotune disable-flashinfer-cutlass-moe-fp4-allgather disable-hybrid-swa-memory
    disable-outlines-disk-cache disable-overlap-schedule disable-piecewise-cuda-graph disable-prefill-cuda-graph
    disable-priority-preemption disable-shared-experts-fusion disable-tokenizer-batch-decode
    disaggregation-decode-enable-offload-kvcache disaggregation-decode-enable-radix-cache
    disaggregation-enable-kv-checksum dllm-fdfo elastic-ep-rejoin enable-adaptive-dispatch-to-encoder
    enable-aiter-allreduce-fusion enable-amd-monokernel enable-attn-tp-input-scattered enable-breakable-cuda-graph
    enable-broadcast-mm-inputs-process enable-cache-report enable-cp-decode-attn-tp enable-cudagraph-gc
    enable-custom-logit-processor enable-decoder-swa-bounded-replay enable-deepep-moe enable-deepep-waterfill
    enable-deepseek-v4-fp4-indexer enable-dense-mlp-attn-tp enable-deterministic-inference enable-double-sparsity
    enable-dp-attention enable-dp-attention-local-control-broadcast enable-dp-lm-head
    enable-draft-weights-cpu-backup enable-dsa-cache-layer-split enable-dsa-fused-indexer
    enable-dynamic-batch-tokenizer enable-dynamic-chunking enable-elastic-expert-backup
    enable-encoder-swa-bounded-replay enable-ep-moe enable-eplb enable-expert-distribution-metrics
    enable-flashinfer-allreduce-fusion enable-flashinfer-cutlass-moe enable-flashinfer-trtllm-moe enable-flexkv
    enable-forward-pass-metrics enable-fp32-lm-head enable-fused-moe-sum-all-reduce enable-fused-qk-norm-rope
    enable-hicache enable-hierarchical-cache enable-hisparse enable-http-worker-reuseport enable-http2
    enable-int8-mamba-checkpoint enable-kv-cache-sharding enable-layernorm-sp enable-layerwise-nvtx-marker
    enable-lean-attention enable-linear-replayssm enable-linear-replayssm-spec enable-linker-mla-dedup
    enable-lmcache enable-mamba-cache-stochastic-rounding enable-megamoe-for-layernorm-sp enable-memory-saver
    enable-metrics-for-all-schedulers enable-mfu-metrics enable-mis enable-mixed-chunk enable-mm-global-cache
    enable-mscclpp enable-multi-layer-eagle enable-multimodal enable-nan-detection enable-nccl-nvls
    enable-nsa-prefill-context-parallel enable-nvidia-megakernel enable-p2p-check enable-page-major-kv-layout
    enable-paged-experts enable-pd-role-switch enable-pdmux enable-piecewise-cuda-graph
    enable-precise-embedding-interpolation enable-prefill-context-parallel enable-prefill-cp enable-prefill-delayer
    enable-prefix-mm-cache enable-priority-scheduling enable-profile-cuda-graph enable-quant-communications
    enable-request-time-stats-logging enable-response-store enable-return-aux-hidden-states
    enable-return-hidden-states enable-return-indexer-topk enable-return-routed-experts enable-scattered-sconv
    enable-session-radix-cache enable-shared-experts-attn-tp enable-single-batch-overlap enable-ssl-refresh
    enable-streaming-session enable-strict-thinking enable-symm-mem enable-tf32-matmul enable-tokenizer-batch-encode
    enable-torch-compile enable-torch-compile-debug-mode enable-torch-symm-mem enable-tp-lm-head-all-to-all
    enable-trace enable-triton-kernel-moe enable-two-batch-overlap enable-unified-cache-external-linker
    enable-unified-memory enable-w4a4-mxfp4-megamoe enable-waterfill enable-watermark enable-weights-cpu-backup
    encoder-only enforce-disable-flashinfer-allreduce-fusion enforce-piecewise-cuda-graph
    enforce-shared-experts-fusion experts-shared-outer-loras export-metrics-to-file flashinfer-mla-disable-ragged
    grpc-mode incremental-streaming-output keep-mm-feature-on-device language-model-only language-only
    log-requests lora-strict-loading lora-use-virtual-experts mlx-enable-sampling mm-enable-dp-encoder
    no-dcp-replicate-q-proj no-dllm-fdfo no-enable-decoder-swa-bounded-replay no-enable-dsa-fused-indexer
    no-enable-fused-qk-norm-rope no-enable-tf32-matmul no-enable-tp-lm-head-all-to-all no-experts-shared-outer-loras
    no-lora-strict-loading no-mm-enable-dp-encoder no-ple-offload-embedding no-speculative-enable-w4a4-mxfp4-megamoe
    ple-offload-embedding pre-warm-nccl prefill-only-disable-kv-cache prefill-round-robin-balance quantize-and-serve
    record-nolora-graph remote-instance-weight-loader-start-seed-via-transfer-engine return-input-ids
    return-output-ids schedule-low-priority-values-first show-time-cost skip-server-warmup sleep-on-idle
    smg-grpc-mode speculative-adaptive speculative-dspark-align-verify-tokens-to-graph-tier
    speculative-enable-w4a4-mxfp4-megamoe speculative-skip-dp-mlp-sync speculative-use-block-verification
    speculative-use-rejection-sampling stream-output stream-response-default-include-usage strip-thinking-cache
    triton-attention-reduce-in-fp32 trust-mm-content-hashes trust-request-chat-template use-ray
    weight-loader-disable-mmap weight-loader-drop-cache-after-load weight-loader-prefetch-checkpoints
"""

_ONE_VALUE = """
    asr-max-buffer-seconds asr-max-concurrent-sessions attention-context-parallel-size attention-data-parallel-size
    attn-cp-size attn-dp-size base-gpu-id batch-notify-size bf16-gemm-backend boundary-reduction c128-page-size
    completion-template constrained-json-max-whitespace-cnt constrained-json-whitespace-pattern context-bucket
    cp-strategy cpu-offload-gb crash-dump-folder cuda-graph-backend-decode cuda-graph-backend-prefill
    cuda-graph-config cuda-graph-max-bs-decode cuda-graph-max-bs-prefill cuda-graph-max-seq-len-prefill
    cuda-graph-prefill-max-context custom-sigquit-handler data-parallel-size dcp-comm-backend dcp-size
    debug-tensor-dump-inject debug-tensor-dump-input-file debug-tensor-dump-output-folder decode-attention-backend
    decode-context-parallel-size decode-log-interval decoupled-spec-bind-endpoint decoupled-spec-connect-endpoints
    decoupled-spec-rank decoupled-spec-role decrypted-config-file decrypted-draft-config-file deepep-config
    deepep-dispatcher-output-dtype deepep-mode deepep-v2-mode default-chat-template-kwargs default-priority-value
    detokenizer-worker-num disaggregation-bootstrap-port disaggregation-decode-allocation-policy
    disaggregation-decode-dp disaggregation-decode-extra-slots disaggregation-decode-host-receive-threshold
    disaggregation-decode-polling-interval disaggregation-decode-retraction-backup disaggregation-decode-tp
    disaggregation-ib-device disaggregation-mode disaggregation-prefill-pp disaggregation-transfer-backend
    dist-init-addr dist-timeout dllm-algorithm dllm-algorithm-config download-dir dp dp-size ds-channel-config-path
    ds-heavy-channel-num ds-heavy-channel-type ds-heavy-token-num ds-sparse-decode-threshold dsa-decode-backend
    dsa-paged-mqa-logits-backend dsa-prefill-backend dsa-topk-backend dsa-triton-union dsv4-attn-backend
    dsv4-prefill-backend dwdp-size dynamic-batch-tokenizer-batch-size dynamic-batch-tokenizer-batch-timeout
    elastic-ep-backend elastic-ep-initial-size elastic-ep-join-mode elastic-ep-join-rank-offset
    elastic-ep-scale-timeout encoder-bootstrap-port encoder-transfer-backend engine-info-bootstrap-port ep
    ep-dispatch-algorithm ep-num-redundant-experts ep-size eplb-algorithm eplb-min-rebalancing-utilization-threshold
    eplb-rebalance-layers-per-chunk eplb-rebalance-num-iterations expert-balancedness-report-mode
    expert-distribution-recorder-buffer-size expert-distribution-recorder-mode expert-parallel-size
    export-metrics-to-file-dir extra-metric-labels fastapi-root-path file-storage-path flashinfer-a2a-dispatch-type
    flashinfer-allreduce-fusion-backend flashinfer-mxfp4-moe-precision flexkv-config-file forward-hooks
    forward-pass-metrics-ipc-name forward-pass-metrics-worker-id fp4-gemm-backend fp8-gemm-backend fuseep-mode
    gated-launch-port gc-warning-threshold-secs gpu-id-step grammar-backend grpc-http-sidecar-port grpc-port
    grpc-response-timeout-secs hf-chat-template-name hicache-host-memory-fraction hicache-host-memory-mode
    hicache-io-backend hicache-mem-layout hicache-ratio hicache-size hicache-storage-backend
    hicache-storage-backend-extra-config hicache-storage-prefetch-policy hicache-storage-prefetch-retry-max-attempts
    hicache-storage-prefetch-retry-poll-interval hicache-write-policy hierarchical-sparse-attention-extra-config
    hisparse-config http2-initial-connection-window-size http2-max-concurrent-streams image-processor-backend
    init-expert-location int8-mamba-ckpt-size json-model-override-args kt-amx-method kt-amx-weight-path kt-cpuinfer
    kt-max-deferred-experts-per-token kt-method kt-num-gpu-experts kt-threadpool-count kt-weight-path
    kv-canary kv-canary-real-data kv-canary-sweep-interval kv-events-config limit-mm-data-per-request
    linear-attn-backend linear-attn-decode-backend linear-attn-prefill-backend linear-attn-verify-backend
    linear-replayssm-cache-len lmcache-config-file load-balance-method load-publish-endpoint
    load-snapshot-publish-interval load-watch-interval log-level-http log-requests-format log-requests-level
    lora-drain-wait-threshold mamba-backend mamba-cache-philox-rounds mamba-full-memory-ratio
    mamba-max-states-per-path mamba-radix-cache-strategy mamba-scheduler-strategy mamba-ssm-dtype
    mamba-track-interval max-ep-size max-mamba-cache-size max-micro-batch-size max-prefill-tokens
    media-url-max-file-size-mb min-free-slots-delay mm-attention-backend mm-feature-transport
    mm-global-cache-backend mm-io-worker-num mm-max-concurrent-calls mm-per-request-timeout
    mm-preprocess-cache-size-mb mm-process-config mm-processor-worker-num model-config-parser
    model-loader-extra-config modelexpress-config modelopt-checkpoint-restore-path modelopt-checkpoint-save-path
    modelopt-export-path modelopt-quant moe-a2a-backend moe-data-parallel-size moe-dense-tp-size moe-dp-size
    moe-runner-backend monokernel-backend mooncake-ib-device msprobe-dump-config multi-item-scoring-delimiter
    nccl-init-addr nccl-port nnodes node-rank nsa-decode-backend nsa-prefill-backend nsa-prefill-cp-mode
    num-continuous-decode-steps num-reserved-decode-tokens offload-group-size offload-mode offload-num-in-group
    offload-prefetch-step optimistic-prefill-attempts otlp-service-name
    paged-experts-num-resident pdlb-url pdmux-config-path piecewise-cuda-graph-compiler
    piecewise-cuda-graph-tokens pipeline-parallel-size ple-offload-backend
    ple-offload-dir pp pp-async-batch-depth pp-max-micro-batch-size pp-size preferred-sampling-params
    prefill-attention-backend prefill-cp-mode prefill-decode-interval prefill-decode-interval-min-bs
    prefill-delayer-max-delay-ms prefill-delayer-max-delay-passes prefill-delayer-queue-min-ratio
    prefill-delayer-token-usage-low-watermark prefill-kv-cache-dequant-dtype prefill-max-requests
    priority-scheduling-preemption-threshold qsa-indexer-dtype quantization-param-path
    radix-cache-backend radix-eviction-policy radix-eviction-policy-config
    remote-instance-weight-loader-backend remote-instance-weight-loader-seed-instance-ip
    remote-instance-weight-loader-seed-instance-service-port remote-instance-weight-loader-send-weights-group-ports
    retraction-policy return-hidden-states-mode rl-on-policy-target rl-quant-profile sampling-backend
    sampling-mask-max-tokens schedule-conservativeness scheduler-recv-interval shared-experts-tp-size sidecar
    sidecar-args sm-group-num smg-http-sidecar-port soft-watchdog-timeout spec-trace-dir
    speculative-accept-threshold-acc speculative-accept-threshold-single speculative-adaptive-config
    speculative-attention-mode speculative-dflash-block-size
    speculative-dflash-draft-window-size speculative-domino-candidate-pool-size speculative-draft-attention-backend
    speculative-draft-kv-cache-dtype speculative-draft-load-format speculative-draft-model
    speculative-draft-model-path speculative-draft-model-quantization speculative-draft-model-revision
    speculative-draft-sink-size speculative-draft-window-size speculative-dsa-topk-backend
    speculative-dspark-block-size speculative-dspark-confidence-sts-path speculative-dspark-sps-table-path
    speculative-eagle-topk speculative-moe-a2a-backend speculative-moe-runner-backend
    speculative-ngram-branch-length speculative-ngram-capacity speculative-ngram-external-corpus-max-tokens
    speculative-ngram-external-corpus-path speculative-ngram-external-sam-budget speculative-ngram-match-type
    speculative-ngram-max-bfs-breadth speculative-ngram-max-trie-depth
    speculative-ngram-min-bfs-breadth
    speculative-num-steps speculative-token-map startup-weight-load-mode stream-interval swa-full-tokens-ratio
    swa-prefix-tails tbo-token-distribution-threshold tokenizer-backend tokenizer-metrics-custom-labels-header
    tokenizer-mode tool-server torch-compile-max-bs torchao-config
    trace-modules triton-attention-num-kv-splits triton-attention-split-tile-size
    unified-cache-external-linker-backend unified-cache-external-linker-config uno-lora-path warmups
     watermark-config weight-cache-mode weight-cache-socket weight-cache-timeout
    weight-loader-prefetch-num-threads weight-version
"""

_ONE_OR_NONE = """
    hybrid-kvcache-ratio model-checksum
"""

_ONE_OR_MORE = """
    allowed-media-domains bucket-e2e-request-latency bucket-inter-token-latency bucket-time-to-first-token
    cuda-graph-bs cuda-graph-bs-decode cuda-graph-bs-prefill debug-tensor-dump-layers encoder-register-urls
    encoder-urls flashinfer-autotune-skip-ops gc-threshold generation-tokens-buckets log-requests-target numa-node
    prefill-delayer-forward-passes-buckets prefill-delayer-wait-seconds-buckets prompt-tokens-buckets
    return-aux-hidden-state-layer-ids tokenizer-metrics-allowed-custom-labels
"""

_ANY_NUMBER = """
    custom-weight-loader uvicorn-access-log-exclude-prefixes
"""

_BLOCKS = {0: _NO_VALUE, None: _ONE_VALUE, "?": _ONE_OR_NONE, "+": _ONE_OR_MORE, "*": _ANY_NUMBER}

# Flag → its number of values as argparse writes it (None: exactly one).
IGNORED: dict[str, int | str | None] = {
    f"--{name}": nargs for nargs, block in _BLOCKS.items() for name in block.split()
}
