"""How the modules of a tree are called, and where adapters act."""

from dataclasses import replace
from typing import Any

import pytest

from multilora.adapters.peft.base_model import BaseModel, Place
from multilora.lora.sharding import output_blocks_of
from multilora.lora.sites import MODEL_LEVEL, DeclaredModules, Shard
from multilora.models.transformers_backend.division import Cut, Division
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import (
    AttentionFact,
    Examination,
    ExpertsFact,
    LinearFact,
    NormFact,
)
from multilora.models.transformers_backend.sites import declare, siblings_of


def linear(path: str, attended: int, out: int = 8) -> LinearFact:
    return LinearFact(path, 4, out, bias=False, transposed=False, attended=attended)


def attention(path: str) -> AttentionFact:
    return AttentionFact(path, 1, 1, 4, 4, 0.5, None, None, sinks=False)


FOUND = Examination(
    linears=(
        linear("t.h.0.attn.qkv", 0),
        linear("t.h.0.attn.proj", 1),
        linear("t.h.0.mlp.proj", 1),
        linear("t.h.0.mlp.up", 1),
        linear("t.h.1.attn.qkv", 1),
        linear("t.h.1.attn.proj", 2),
        linear("t.h.1.mlp.proj", 2),
        linear("t.h.1.mlp.up", 2, out=16),
        linear("t.last", 2),
        linear("out", 2),
    ),
    norms=(NormFact("t.h.0.ln", 4, 1, 0), NormFact("t.h.1.ln", 4, 1, 1), NormFact("t.ln", 4, 1, 2)),
    attentions=(attention("t.h.0.attn"), attention("t.h.1.attn")),
    head_attended=2,
)


def test_names_tell_modules_apart_and_paths_are_the_tree_s() -> None:
    declared = DeclaredModules()
    sites = declare(FOUND, declared, Division(), embedding=("t.wte", 101, 4), head=("out", 4, 101, False))
    assert sites.layers == "t.h"
    base = BaseModel(tuple(declared.sites), tuple(declared.norms), 101, 4, False, None, sites.layers)
    assert base.places == {
        "t.wte": Place(MODEL_LEVEL, "embed_tokens"),
        "out": Place(MODEL_LEVEL, "lm_head"),
        "score": Place(MODEL_LEVEL, "score"),
        "t.last": Place(MODEL_LEVEL, "last"),
        "t.ln": Place(MODEL_LEVEL, "t.ln"),
        **{f"t.h.{i}.attn.qkv": Place(i, "qkv") for i in (0, 1)},
        **{f"t.h.{i}.attn.proj": Place(i, "attn.proj") for i in (0, 1)},
        **{f"t.h.{i}.mlp.proj": Place(i, "mlp.proj") for i in (0, 1)},
        **{f"t.h.{i}.mlp.up": Place(i, f"t.h.{i}.mlp.up") for i in (0, 1)},
        **{f"t.h.{i}.ln": Place(i, "ln") for i in (0, 1)},
    }
    assert base.place_of("h.1.attn.qkv") == Place(1, "qkv")
    assert base.is_table("wte") and not base.is_table("t.last")


def test_layers_of_one_module_that_read_one_tensor_are_one_site() -> None:
    def reads(path: str, source: int, **changes: object) -> LinearFact:
        return replace(linear(f"t.h.0.{path}", 0), source=source, **changes)  # type: ignore[arg-type]

    q, k, o = reads("attn.q", 0), reads("attn.k", 0, out_features=4), reads("attn.o", 1)
    gate, conv, conv2 = reads("mlp.gate", 0), reads("c.a", 2, transposed=True), reads("c.b", 2, transposed=True)
    unknown, unknown2 = reads("u.a", -1), reads("u.b", -1)
    facts = [q, gate, k, o, conv, conv2, unknown, unknown2]
    assert siblings_of(facts, Division()) == [[q, k], [gate], [o], [conv], [conv2], [unknown], [unknown2]]
    cut = {q.path: Cut(Shard.COLUMN), k.path: Cut(Shard.KV)}
    assert siblings_of([q, k], Division(cut)) == [[q, k]]
    assert siblings_of([q, k], Division({q.path: Cut(Shard.COLUMN)})) == [[q], [k]]
    assert siblings_of([q, k], Division({q.path: Cut(Shard.ROW), k.path: Cut(Shard.ROW)})) == [[q], [k]]
    biased, listed, listed2 = reads("attn.k", 0, bias=True), reads("list.0", 3), reads("list.1", 3)
    assert siblings_of([q, biased, listed, listed2], Division()) == [[q], [biased], [listed], [listed2]]
    found = replace(FOUND, linears=(q, k, o), attentions=(attention("t.h.0.attn"),))
    sites = declare(found, DeclaredModules(), Division(), embedding=("t.e", 9, 4), head=("out", 4, 9, False))
    joined = sites.linears[q.path, k.path]
    assert (joined.name, joined.out_features) == ("q+k", 12)
    assert [(s.module, s.offset, s.out_features) for s in joined.slices] == [("q", 0, 8), ("k", 8, 4)]


def test_what_acts_before_the_last_keys_and_values() -> None:
    declared = DeclaredModules()
    declare(FOUND, declared, Division(), embedding=("t.wte", 101, 4), head=("out", 4, 101, False))
    behind = {(site.layer, s.module) for site in declared.sites for s in site.slices if not s.before_kv}
    assert behind == {
        (1, "attn.proj"),
        (1, "mlp.proj"),
        (1, "t.h.1.mlp.up"),
        (MODEL_LEVEL, "last"),
        (MODEL_LEVEL, "lm_head"),
    }
    assert {norm.module for norm in declared.norms if not norm.before_kv} == {"t.ln"}


@pytest.mark.parametrize(
    ("gate_up", "expected"),
    [
        (ParameterCut(-2, blocks=2), (Shard.COLUMN, 1, 2)),
        (ParameterCut(-1, unit=2), (Shard.COLUMN, 2, 1)),
        (None, (Shard.REPLICATED, 1, 1)),
    ],
)
def test_adapters_on_experts_are_cut_as_their_weights_are(
    gate_up: ParameterCut | None, expected: tuple[Shard, int, int]
) -> None:
    path = "t.h.0.mlp.experts"
    fact = ExpertsFact(path, 3, 4, 6, attended=1, top_k=2)
    cuts = {f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": ParameterCut(-1)} if gate_up else {}
    found = declare(
        replace(FOUND, experts=(fact,)),
        DeclaredModules(),
        Division(parameters=cuts),
        embedding=("t.e", 9, 4),
        head=("out", 4, 9, False),
    )
    both, down = (found.experts[path][name].slices[0] for name in ("gate_up_proj", "down_proj"))
    assert (both.shard, both.unit, both.blocks) == expected
    assert down.shard is (Shard.ROW if gate_up else Shard.REPLICATED)
    if gate_up:  # one definition: what a rank holds of the weight is what it holds of B
        weight = (3, 12, 4) if gate_up.dim == -2 else (3, 4, 12)
        for rank in range(2):
            held = output_blocks_of(found.experts[path]["gate_up_proj"], both, rank, 2)
            assert gate_up.part(weight, rank, 2)[gate_up.dim] in (held, held[0])


def test_experts_are_sites_of_their_layers_and_know_modules_where_gate_and_up_are_known() -> None:
    experts = ExpertsFact("t.h.0.mlp.experts", 3, 4, 5, attended=1, top_k=2, silu=True)
    tables: dict[str, Any] = {"embedding": ("t.e", 9, 4), "head": ("out", 4, 9, False)}

    def base_of(*facts: ExpertsFact) -> BaseModel:
        declared = DeclaredModules()
        found = replace(FOUND, experts=facts)
        sites = declare(found, declared, Division(), **tables)
        assert set(sites.experts) in ({f.path for f in facts}, set())
        return BaseModel(tuple(declared.sites), tuple(declared.norms), 9, 4, False, None, sites.layers)

    base = base_of(experts, replace(experts, path="t.h.1.mlp.experts", attended=2))
    gate_up, down = (Place(0, f"experts.{name}") for name in ("gate_up_proj", "down_proj"))
    assert base.places["t.h.0.mlp.experts.gate_up_proj"] == gate_up
    assert base.expert_parameters["t.h.1.mlp.experts"] == ("gate_up_proj", "down_proj")
    assert (base.shapes[gate_up.module], base.shapes[down.module]) == ((4, 10), (5, 4))
    assert base.before_kv[gate_up] and not base.before_kv[Place(1, "experts.down_proj")]
    up = base.place_of("h.1.mlp.experts.2.up_proj")
    assert up is not None and (base.expert_place(up).offset, base.expert_place(up).width) == (5, 5)
    interleaved = base_of(replace(experts, silu=False))
    assert interleaved.expert_place(gate_up).width == 10 and interleaved.place_of("h.0.mlp.experts.2.up_proj") is None
    assert interleaved.place_of("h.0.mlp.experts.2.down_proj") is not None
    for facts in (
        (experts, replace(experts, path="t.h.0.mlp2.experts")),
        (experts, replace(experts, path="t.h.1.mlp.experts", inner=6)),
        (replace(experts, path="t.experts"),),
    ):
        assert not base_of(*facts).expert_parameters
