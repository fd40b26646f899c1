"""No key and no prompt is in a log, whatever level it has, and whatever goes wrong."""

import logging

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from keys import BOTH_TENANTS, KeyedServer, key_of, write_keys

from multilora.errors import BadRequest
from multilora.server.key_hash import write_hash

PROMPT = "my secret is quite unmistakable"
ANSWERED = {"text": PROMPT, "sampling_params": {"max_new_tokens": 2}}


def send_everything(s, **headers):
    """Requests that succeed, and that fail in each of the ways there are."""
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
    for path, body in (
        ("/generate", ANSWERED),
        ("/generate", ANSWERED | {"stream": True}),
        ("/generate", ANSWERED | {"lora_path": "nothing"}),
        ("/generate", ANSWERED | {"unknown": PROMPT}),
        ("/generate", {"text": PROMPT * 100}),
        ("/generate", {"text": [PROMPT, 3]}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": "many"}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"guided_regex": f"({PROMPT}"}),
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": 2}),
        ("/v1/messages", chat),
        ("/v1/messages/count_tokens", chat),
        ("/tokenize", {"prompt": PROMPT}),
        ("/load_lora_adapter", {"lora_name": "a", "lora_path": "nowhere"}),
        ("/nothing", {"prompt": PROMPT}),
        ("/generate", f'{{"text": "{PROMPT}"'.encode()),
    ):
        s.post(path, body, **headers)
    s.client.refuse = lambda message: BadRequest("the engine says no")
    s.post("/generate", ANSWERED, **headers)
    s.client.refuse = lambda message: None


@pytest.mark.parametrize("keys", ["flags", "file"])
def test_no_key_and_no_prompt_is_logged(tmp_path, caplog, keys):
    client = FakeEngineClient(vocab_size=320)
    with caplog.at_level(logging.DEBUG):
        if keys == "file":
            s = KeyedServer(tmp_path, client=client, tokenizer=byte_level_tokenizer())
            secrets = [key_of(name) for name in ("acme", "zorg", "ops")]
            for secret in (*secrets, "ml-a-wrong-key-of-somebody"):
                send_everything(s, authorization=f"Bearer {secret}")
                send_everything(s, **{"x-api-key": secret})
            write_keys(s.path, BOTH_TENANTS + "\n[keys.broken]\nhash2 = 3\n")
            s.app.state.keys.reload()
            secrets += [write_hash(secret, bytes(16))[-64:] for secret in secrets]
        else:
            secrets = ["user-key-0123456789", "admin-key-0123456789", "scrape-key-0123456789"]
            flags = dict(zip(("api_key", "admin_api_key", "metrics_key"), secrets, strict=True))
            s = LocalServer(client, byte_level_tokenizer(), **flags)
            for secret in (*secrets, "a-wrong-key-of-somebody"):
                send_everything(s, authorization=f"Bearer {secret}")
    assert len(caplog.records) > 3, "something was logged at all"
    text = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    for secret in (*secrets, "a-wrong-key-of-somebody", PROMPT):
        assert secret not in text


@pytest.mark.parametrize("keys", ["flags", "file"])
def test_no_key_is_in_an_answer(tmp_path, keys):
    if keys == "file":
        s = KeyedServer(tmp_path)
        secret, admin = key_of("acme"), key_of("ops")
    else:
        s = LocalServer(FakeEngineClient(), None, api_key="user-key-0123456789", admin_api_key="admin-key-0123456789")
        secret, admin = "user-key-0123456789", "admin-key-0123456789"
    for path in ("/server_info", "/metrics", "/v1/models", "/openapi.json", "/nothing", "/model_info"):
        for key in (secret, admin):
            answer = s.get(path, authorization=f"Bearer {key}")
            assert not {part for part in (secret, admin, "blake2b:") if part in answer.text + str(answer.headers)}
