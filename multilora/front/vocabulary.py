"""What the token ids of a request mean: the base model's tokens, or those of an adapter that brings its own.

An adapter that trains token embeddings may have been trained with added tokens. The tokenizer that lies beside its
weights, where it has other tokens than the base model's, then reads and writes the text of its requests; its head may
have more or fewer rows. Such vocabularies are found when an adapter is loaded, kept by version, and dropped with it.
Adapters that train no token embedding cost nothing here.
"""

import logging
import os
import tempfile
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from weakref import WeakValueDictionary

from multilora.adapters.sources import DirectorySource
from multilora.adapters.sources.files import open_regular
from multilora.engine.messages import AdapterInfo, Ready
from multilora.errors import AdapterError, AdapterInvalid, BadRequest, ConfigError
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.registry import AdapterRegistry
from multilora.front.tokenizer import Tokenizer
from multilora.params import SamplingParams

logger = logging.getLogger(__name__)

TOKENS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these makes a tokenizer
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
TOKENIZER_FILES = (*TOKENS, *BESIDE)
MAX_BYTES = 64 << 20  # of one file; the largest in use, of 260,000 tokens, has 33 MB
TRIAL = "a B 1.\n日本"
NO_TOKENIZER = (
    "the adapter has another vocabulary than the base model and came without a tokenizer: send input_ids, "
    "or save the tokenizer beside the adapter and load it again"
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that the ids of a request stand for.

    tokenizer: None where the server runs on ids only. size: number of logits per row. own: whether some id is another
    token than the base model's. ends: ids that end an answer besides the base model's. no_text: the reason why text
    is refused; empty if it is not.
    """

    tokenizer: Tokenizer | None
    size: int
    own: bool = False
    ends: tuple[int, ...] = ()
    no_text: str = ""

    def reader(self, what: str, param: str | None = None) -> Tokenizer:
        """Return the tokenizer that turns ids into text. Raises BadRequest if there is none for `what`."""
        if self.tokenizer is None:
            raise BadRequest(f"{what} needs a tokenizer, and --skip-tokenizer-init is set", param=param)
        return self.tokenizer

    def writer(self, what: str, param: str | None = None) -> Tokenizer:
        """Return the tokenizer that turns text into ids. Raises BadRequest if there is none for `what`."""
        tokenizer = self.reader(what, param)
        if self.no_text:
            raise BadRequest(f"{what}: {self.no_text}", param=param)
        return tokenizer

    def check_grammar(self, params: SamplingParams) -> None:
        """Raise BadRequest for a grammar over other tokens than the base model's."""
        if self.own and params.grammar_field is not None:
            what = "not for an adapter with tokens of its own: grammars know the base model's tokens only"
            raise BadRequest(f"sampling_params.{params.grammar_field}: {what}", param=params.grammar_field)


class Vocabularies:
    """The vocabularies of the base model and of the loaded adapters.

    tokenizer: the base model's. roots: the directories of --lora-root.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, ready: Ready, registry: AdapterRegistry, roots: tuple[str, ...] = ()
    ):
        self.base = Vocabulary(tokenizer, ready.vocab_size)
        self._eos_token_ids = ready.eos_token_ids
        self._registry = registry
        self._roots = roots
        self._own: dict[int, Vocabulary] = {}
        self._tokenizers: WeakValueDictionary[bytes, Tokenizer] = WeakValueDictionary()  # by what is in their files
        self._loading = threading.Lock()

    def of(self, spec: AdapterSpec) -> Vocabulary:
        """Return the vocabulary of `spec`. Compositions have the base model's; so have names that are not loaded,
        which the registry refuses."""
        return self.of_version(self._registry.sole_version(spec))

    def of_version(self, version: int | None) -> Vocabulary:
        """Return the vocabulary of requests on which this version alone acts; None: the base model, or a sum."""
        return self.base if version is None else self._own.get(version, self.base)

    def concerns(self, info: AdapterInfo) -> bool:
        """Whether an adapter may have tokens of its own, so that `add` has to look for its tokenizer."""
        return info.trains_tokens or self._size(info) != self.base.size

    def add(self, info: AdapterInfo, path: str | None) -> None:
        """Look for the tokenizer of an adapter that was just loaded from `path`; None means that it has no files.

        This may read for a second, so it must not run on an event loop's thread. Raises AdapterError, and changes
        nothing then.
        """
        base, size = self.base.tokenizer, self._size(info)
        files = {} if base is None or path is None else read_files(path, self._roots)
        if base is None or not files:
            if size != self.base.size:
                self._own[info.version] = Vocabulary(base, size, own=True, no_text=NO_TOKENIZER)
            return
        own = self._tokenizer(files, base)
        if own is not base:
            self._own[info.version] = Vocabulary(own, size, own=True, ends=self._ends(own, size))
            logger.info("%s has a tokenizer of its own: %d tokens, %d rows", path, own.vocab_size, size)
        elif size != self.base.size:
            self._own[info.version] = Vocabulary(base, size)

    def add_unread(self, info: AdapterInfo, reason: str) -> None:
        """The adapter's tokenizer cannot be looked for here: its requests carry token ids, and `reason` says why."""
        self._own[info.version] = Vocabulary(self.base.tokenizer, self._size(info), own=True, no_text=reason)

    def remove(self, version: int) -> None:
        """Forget the vocabulary of a version, if it has one. Running requests keep the object that they hold."""
        self._own.pop(version, None)

    def _tokenizer(self, files: dict[str, bytes], base: Tokenizer) -> Tokenizer:
        """Return the base model's tokenizer if the tokens are the same. Adapters with equal files share one object,
        which may take 100 MB."""
        digest = sha256(repr(sorted((name, sha256(data).digest()) for name, data in files.items())).encode()).digest()
        with self._loading:
            tokenizer = self._tokenizers.get(digest)
            if tokenizer is None:
                tokenizer = load_tokenizer(files)
                if tokenizer.hf.get_vocab() == base.hf.get_vocab():
                    tokenizer = base
                elif base.hf.chat_template:
                    tokenizer.hf.chat_template = base.hf.chat_template
                self._tokenizers[digest] = tokenizer
            return tokenizer

    def _size(self, info: AdapterInfo) -> int:
        return self.base.size if info.vocab_size is None else info.vocab_size

    def _ends(self, own: Tokenizer, size: int) -> tuple[int, ...]:
        eos = own.eos_token_id
        return () if eos is None or eos >= size or eos in self._eos_token_ids else (eos,)


def read_files(path: str, roots: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return {name: bytes} of the tokenizer's files beside the adapter in directory `path`, empty if there is no
    tokenizer. Raises AdapterError."""
    directory = DirectorySource(roots, TOKENIZER_FILES).fetch(path)
    found = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    return {name: _read(directory / name) for name in found} if set(found) & set(TOKENS) else {}


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise AdapterInvalid(f"{path.name}: {size} bytes, at most {MAX_BYTES} are read")
        return file.read()


def load_tokenizer(files: dict[str, bytes]) -> Tokenizer:
    """Load a tokenizer from these files alone, out of a directory of their own, so that no other file is read.

    Raises AdapterInvalid, or AdapterError if the disk refuses.
    """
    with tempfile.TemporaryDirectory(prefix="multilora-tokenizer-") as directory:
        try:
            for name, data in files.items():
                (Path(directory) / name).write_bytes(data)
        except OSError as e:
            raise AdapterError(f"the tokenizer of the adapter could not be kept: {e.strerror}") from e
        try:
            tokenizer = Tokenizer.load(directory)
            tokenizer.decode(tokenizer.encode(TRIAL))  # some mistakes show only then
            return tokenizer
        except BaseException as e:  # over a broken file libraries raise whatever comes; a panic is no Exception
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            reason = e.message if isinstance(e, ConfigError) else f"{type(e).__name__}: {e}"
            reason = reason.replace(directory, "its directory")
            raise AdapterInvalid(f"the tokenizer of the adapter cannot be loaded: {reason:.500}") from e
