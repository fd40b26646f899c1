import copy
import json

import pytest
from fakes.tokenizers import byte_level_tokenizer, metaspace_tokenizer
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from multilora.errors import BadRequest, ConfigError
from multilora.front.tokenizer import Tokenizer

USER = {"role": "user", "content": "the cat"}
CHAT = "<s><|im|>user: the cat</s><|im|>assistant: "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.hf.save_pretrained(path)
    return str(path)


def full(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_facts(tokenizer):
    assert tokenizer.eos_token_id == 1
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == len(tokenizer.hf.get_vocab())


def test_encode_adds_bos_once(tokenizer):
    ids = tokenizer.encode("the cat")
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert tokenizer.encode("<s>the cat") == ids
    assert tokenizer.decode(ids) == "the cat"


def test_a_bos_in_the_text_stays_when_the_tokenizer_adds_none():
    tokenizer = byte_level_tokenizer()
    tokenizer.hf.backend_tokenizer.post_processor = ByteLevel()
    assert full(tokenizer, tokenizer.encode("<s>the")) == "<s>the"


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_round_trip(make):
    tokenizer = make()
    for text in ["the cat", "日本語 🙂\n", "a  b", "naïve .", "x ' s n't , ."]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_special_tokens(tokenizer):
    ids = [*tokenizer.encode("the"), 2, 1]
    assert tokenizer.decode(ids) == "the"
    assert full(tokenizer, ids) == "<s>the<|im|></s>"


def test_encode_chat(tokenizer):
    ids = tokenizer.encode_chat([USER])
    assert full(tokenizer, ids) == CHAT
    assert ids.count(0) == 1
    assert (
        full(tokenizer, tokenizer.encode_chat([USER], add_generation_prompt=False)) == CHAT[: CHAT.index("</s>") + 4]
    )


def test_encode_chat_continues_the_final_message(tokenizer):
    messages = [USER, {"role": "assistant", "content": "the dog"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert full(tokenizer, ids).endswith("assistant: the dog")


def test_template_kwargs_reach_the_template(directory):
    tokenizer = Tokenizer.load(directory, chat_template="{{ mood }}:{{ tools | length }}")
    assert tokenizer.decode(tokenizer.encode_chat([USER], tools=[{"type": "function"}], mood="sad")) == "sad:1"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", [USER], "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", [USER], "chat template"),
        ("{{ messages[0].a.b }}", [USER], "chat template"),
        ("{% for %}", [USER], "chat template"),
        ("x{{ messages }}", [], "chat template"),
    ],
)
def test_template_errors(directory, template, messages, says):
    with pytest.raises(BadRequest, match=says):
        Tokenizer.load(directory, chat_template=template).encode_chat(messages)


def test_contradicting_chat_options(tokenizer):
    with pytest.raises(BadRequest, match="continue_final_message"):
        tokenizer.encode_chat([USER], add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "conversation"])
def test_clients_cannot_change_the_rendering_itself(tokenizer, name):
    with pytest.raises(BadRequest, match=name):
        tokenizer.encode_chat([USER], **{name: "x"})


def test_missing_template(tokenizer):
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf.backend_tokenizer, eos_token="</s>")
    with pytest.raises(BadRequest, match="no chat template"):
        Tokenizer(hf).encode_chat([USER])


def test_load(directory, tokenizer):
    loaded = Tokenizer.load(directory)
    assert loaded.encode("the 日本語") == tokenizer.encode("the 日本語")
    assert loaded.encode_chat([USER]) == tokenizer.encode_chat([USER])
    assert loaded.special_ids == tokenizer.special_ids


def test_chat_template_from_files(directory, tmp_path):
    (tmp_path / "t.jinja").write_text("hi {{ messages[0].content }}")
    (tmp_path / "t.json").write_text(json.dumps({"chat_template": "ho {{ messages[0].content }}"}))
    for name, text in [("t.jinja", "hi the cat"), ("t.json", "ho the cat")]:
        tokenizer = Tokenizer.load(directory, chat_template=str(tmp_path / name))
        assert tokenizer.decode(tokenizer.encode_chat([USER])) == text


def test_bad_chat_template_option(directory, tmp_path):
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ConfigError, match="no/such"):
        Tokenizer.load(directory, chat_template="no/such/file")
    with pytest.raises(ConfigError, match=r"t\.json"):
        Tokenizer.load(directory, chat_template=str(tmp_path / "t.json"))


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Tokenizer.load(str(tmp_path))


def test_token_text_keeps_the_leading_space():
    tokenizer = metaspace_tokenizer()
    the = tokenizer.hf.convert_tokens_to_ids("▁the")
    assert tokenizer.decode([the]) == "the"
    assert tokenizer.token_text(the) == " the"
    assert tokenizer.token_text(tokenizer.hf.convert_tokens_to_ids("he")) == "he"
    assert tokenizer.token_text(1) == "</s>"


def test_token_texts_join_to_the_text(tokenizer):
    ids = tokenizer.encode("the cat and\n\nthe dog")[1:]
    assert "".join(map(tokenizer.token_text, ids)) == "the cat and\n\nthe dog"


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), metaspace_tokenizer()], ids=["bytes", "metaspace"])
def test_ids_are_those_of_transformers(tokenizer):
    """Encoding goes past transformers' own method; a class that has one of its own keeps it."""
    assert tokenizer._fast
    for text in ("", "the cat", "<s>the</s> <|im|>日本\n", " \t x" * 50, "é\u0301🙂"):
        assert tokenizer._encode(text) == tokenizer.hf.encode(text)
        without = tokenizer.hf.encode(text, add_special_tokens=False)
        assert tokenizer._encode(text, add_special_tokens=False) == without

    class Own(type(tokenizer.hf)):
        def encode(self, text, **options):
            return [7, 7]

    own = copy.copy(tokenizer.hf)
    own.__class__ = Own
    assert Tokenizer(own).encode("x") == [7, 7]


def test_a_tokenizer_that_was_saved_truncating_and_padding_does_neither(tmp_path):
    hf = byte_level_tokenizer().hf
    hf.backend_tokenizer.enable_truncation(3)
    hf.backend_tokenizer.enable_padding(length=8)
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("the cat and the dog") == byte_level_tokenizer().encode("the cat and the dog")
    assert len(tokenizer.encode("x")) == 2
