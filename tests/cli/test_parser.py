"""The command line: one flag per Config field, SGLang's flags, errors, and what a process prints.

Covers `compat.py` too.
"""

import dataclasses
import subprocess
import sys

import pytest

from multilora import __main__
from multilora.cli import compat as cli_compat
from multilora.cli import parser as cli
from multilora.config import Config
from multilora.errors import ConfigError
from multilora.lora_path import LoraPath
from multilora.options import options_of


def config(*argv: str) -> Config:
    return cli.parse(["serve", *argv]).config()


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "multilora", *argv], capture_output=True, text=True, timeout=300)


def given(opt) -> tuple[list[str], object]:
    """Arguments that set an option to something else than its default, and what Config then holds."""
    if opt.type is bool:
        return ([f"--no-{opt.flag[2:]}"], False) if opt.default else ([opt.flag], True)
    if opt.type is LoraPath:
        return [opt.flag, "a=/a"], (LoraPath("a", "/a"),)
    values = {
        "cors_origins": ("https://a.example", "*"),
        "fair_tenant_weight": ("a=2", "b=0.5"),
        "lora_resolver_url": ("https://a.example/loras", "s3://bucket"),
        "lora_resolver_hub": ("org/*", "other/lora-*"),
    }.get(opt.name)
    if values:
        return [opt.flag, *values], values
    if opt.name == "otlp_traces_endpoint":
        return [opt.flag, "http://a.example:4318"], "http://a.example:4318"
    if opt.many:
        return [opt.flag, "q_proj", "v_proj"], ("q_proj", "v_proj")
    if opt.choices:
        return [opt.flag, str(opt.choices[-1])], opt.choices[-1]
    if opt.size:
        return [opt.flag, "3MiB"], 3 * 2**20
    value = {int: 7 if opt.name.startswith("speculative_") else 77, float: 0.25, str: "some-text"}[opt.type]
    return [opt.flag, str(value)], value


FLAGS = [opt for opt in options_of(Config) if not opt.name.endswith("_file")]  # files: see test_keys.py


@pytest.mark.parametrize("opt", FLAGS, ids=lambda opt: opt.name)
def test_every_field_has_a_flag(opt):
    argv, value = given(opt)
    assert getattr(config(*argv), opt.name) == value
    if opt.type is not bool:
        assert getattr(config(f"{opt.flag}={argv[1]}"), opt.name) == (value[:1] if opt.many else value)


def test_every_flag_has_a_field():
    fields = {f.name for f in dataclasses.fields(Config)}
    for opt in options_of(Config):
        argv, _ = given(opt)
        assert set(cli.parse(["serve", *argv]).options) <= fields


def test_no_flags_are_the_defaults():
    assert cli.parse(["serve"]).options == {}
    assert config() == Config()


def test_aliases():
    assert config("--model", "m", "--tp", "1") == config("--model-path", "m", "--tensor-parallel-size", "1")


def test_lora_paths_mixes_forms_and_repeats():
    forms = ("/x/a", "b=/x/b", '{"lora_name": "c", "lora_path": "/x/c", "pinned": true}')
    paths = (LoraPath("/x/a", "/x/a"), LoraPath("b", "/x/b"), LoraPath("c", "/x/c", True))
    assert config("--lora-paths", *forms).lora_paths == paths
    assert config("--lora-paths", forms[0], "--lora-paths", *forms[1:]).lora_paths == paths
    assert config("--lora-paths").lora_paths == ()


def test_lora_root_is_repeatable():
    assert config("--lora-root", "/a", "--lora-root", "/b").lora_root == ("/a", "/b")


def test_a_command_line_of_sglang(caplog):
    argv = (
        "--model-path m --tp-size 2 --enable-lora --enable-metrics --schedule-conservativeness 0.3 "
        "--cuda-graph-bs 1 2 4 --disable-overlap-schedule --watchdog-timeout=300 --lora-backend flashinfer"
    )
    assert config(*argv.split()) == Config(model_path="m", enable_lora=True, tp_size=2)
    assert [r.getMessage().split()[0] for r in caplog.records if r.name == "multilora.cli.parser"] == [
        "--schedule-conservativeness",
        "--cuda-graph-bs",
        "--disable-overlap-schedule",
    ]


def test_ignored_flags_are_not_ours():
    ours = set(cli.flags())
    ignored = set(cli_compat.IGNORED)
    assert len(ignored) > 400
    assert not ours & (ignored | set(cli_compat.REFUSED) | set(cli_compat.ALWAYS_ON))
    assert not ignored & (set(cli_compat.REFUSED) | set(cli_compat.ALWAYS_ON))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-loras-per-bach", "4"], "unknown flag --max-loras-per-bach; did you mean --max-loras-per-batch?"),
        (["--prot=4"], "unknown flag --prot; did you mean --port?"),
        (["--disable-overlap-schedul"], "did you mean --disable-overlap-schedule?"),
        (["--zzzzzzzz"], "unknown flag --zzzzzzzz; see multilora serve --help"),
        (["--max-lora", "8"], "unknown flag --max-lora; did you mean"),  # no abbreviations
        (["adapter"], "unexpected argument 'adapter'"),
        (["--port", "x"], "--port: invalid int value: 'x'"),
        (["--port"], "--port: expected one argument"),
        (["--dtype", "int4"], "--dtype must be one of"),
        (["--arena-bytes", "8XB"], "--arena-bytes: '8XB' is not a size"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(ConfigError) as error:
        config(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize("argv", [["serve", "--prot", "1"], ["serve", "--log-level", "loud"], [], ["swerve"]])
def test_an_error_is_one_line_and_code_2(argv):
    done = run(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("multilora: error: ")
    assert done.stderr.count("\n") == 1


def test_help_and_version_are_light():
    program = (
        "import sys, multilora.__main__ as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numpy', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for argv in (["serve", "--help"], ["--version"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_help_shows_every_flag_and_hides_sglangs():
    text = run("serve", "--help").stdout
    assert [flag for flag in cli.flags() if flag not in text] == []
    assert "--schedule-conservativeness" not in text
    assert max(map(len, text.splitlines())) <= 118


def test_main_hands_the_config_to_serve(monkeypatch):
    import types

    seen = []
    fake = types.ModuleType("multilora.server.serve")
    fake.serve = lambda config: seen.append(config) or 7
    monkeypatch.setitem(sys.modules, "multilora.server.serve", fake)
    monkeypatch.setattr("multilora.logs.setup", lambda level, role, form: seen.append((level, role)))
    assert __main__.main(["serve", "--port", "1234", "--log-level", "warning"]) == 7
    assert seen == [("warning", "front"), Config(port=1234, log_level="warning")]
