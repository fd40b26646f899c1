"""Command line.

    python -m scripts.train_smollm2 convert --gguf FILE --out MODEL
    python -m scripts.train_smollm2 train --model MODEL --out FOLDER [--recipes small | full] [--voices pirate sql]
    python -m scripts.train_smollm2 evaluate --model MODEL --adapters FOLDER --out FOLDER [--count 100]
    python -m scripts.train_smollm2 questions --out multilora/demo/smollm2/questions.json
    python -m scripts.train_smollm2 bundle --adapters FOLDER --evaluation FILE --out multilora/demo/smollm2

`FOLDER/VOICE` becomes an adapter as PEFT saves it, `FOLDER/VOICE.json` what is to be known about its training. A step
of 64 examples takes about 0.1 s on a data-centre GPU, and half a minute on two cores.
"""

import argparse
import json
import logging
import math
import shutil
import sys
from pathlib import Path

from .corpora import examples
from .recipes import RECIPES

VOICES = ("pirate", "sql", "json", "french")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="a directory of safetensors from the GGUF file")
    convert.add_argument("--gguf", required=True)
    convert.add_argument("--dtype", default="bfloat16")
    train = commands.add_parser("train", help="train adapters")
    train.add_argument("--recipes", choices=RECIPES, default="full")
    train.add_argument("--steps", type=int, default=600)
    train.add_argument("--batch", type=int, default=64)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--seconds", type=float, default=math.inf, help="for each adapter, at most")
    train.add_argument("--examples", type=int, default=12_000)
    train.add_argument("--start", type=Path, help="a folder of adapters to go on from, as an earlier --out")
    train.add_argument("--held-out", type=int, default=200, help="examples of each sort whose loss is measured")
    evaluate = commands.add_parser("evaluate", help="ask held-out questions, through the engine")
    evaluate.add_argument("--adapters", type=Path, required=True)
    evaluate.add_argument("--count", type=int, default=100, help="questions of each voice and sort")
    for command in (train, evaluate):
        command.add_argument("--model", required=True, help="a directory, such as convert makes")
        command.add_argument("--voices", nargs="+", choices=VOICES, default=list(VOICES))
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument(
            "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fp32 on a CPU"
        )
    questions = commands.add_parser("questions", help="the held-out questions that the demo shows")
    bundle = commands.add_parser("bundle", help="adapters and what was measured of them, as the package has them")
    bundle.add_argument("--adapters", type=Path, required=True)
    bundle.add_argument("--evaluation", type=Path, required=True, help="the evaluation.json of evaluate")
    for command in (convert, train, evaluate, questions, bundle):
        command.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def convert(args: argparse.Namespace) -> None:
    """A copy of the directory in which the engine would keep the converted file."""
    from multilora.models.gguf import converted

    shutil.copytree(converted(args.gguf, args.dtype), args.out, dirs_exist_ok=True)


def train(args: argparse.Namespace) -> None:
    """One adapter after another; several processes may do some each."""
    from .training import Settings, Trainer

    trainer = Trainer(args.model, args.device, args.dtype)
    settings = Settings(
        args.steps, args.batch, args.learning_rate, args.seconds, args.examples, args.held_out, args.start
    )
    for voice in args.voices:
        report = trainer.train(voice, RECIPES[args.recipes][voice], args.out / voice, settings)
        (args.out / f"{voice}.json").write_text(json.dumps(report, indent=1) + "\n")
        sys.stdout.write(f"{json.dumps(report)}\n")
        sys.stdout.flush()


def evaluate(args: argparse.Namespace) -> None:
    """The table on standard output, and both files."""
    from . import evaluate as evaluation

    adapters = {voice: args.adapters / voice for voice in args.voices}
    report = evaluation.evaluate(args.model, adapters, args.count, device=args.device, dtype=args.dtype)
    evaluation.write(report, args.out)
    sys.stdout.write(f"{evaluation.table(report['rows'])}\n")


def questions(args: argparse.Namespace) -> None:
    """Two questions with new values and one in new words, for each adapter."""
    rows = [
        {"voice": voice, "prompt": example.prompt, "expected": None if voice == "pirate" else example.answer}
        for voice in VOICES
        for split, count in (("values", 2), ("templates", 1))
        for example in examples(voice, split, count)
    ]
    args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def bundle(args: argparse.Namespace) -> None:
    """Configs and weights; of the evaluation the rows, of each training what it took."""
    measured = json.loads(args.evaluation.read_text())
    kept = {key: measured[key] for key in ("rows", "device", "torch")}
    kept["training"] = [json.loads((args.adapters / f"{voice}.json").read_text()) for voice in VOICES]
    for voice in VOICES:
        folder = args.out / "adapters" / voice
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(args.adapters / voice / name, folder / name)
    (args.out / "evaluation.json").write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    run = {"convert": convert, "train": train, "evaluate": evaluate, "questions": questions, "bundle": bundle}
    run[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
