# SPDX-License-Identifier: Apache-2.0
"""A small trained Llama made as big as another without changing what it computes.

    python -m jobs.inflate --model demo --like llama-3.2-1b --output FOLDER

For benchmarks: the text, and so what is accepted, is a trained model's, the cost a big one's
(except the output layer's: the vocabulary stays).

How: `inflate_model`. Before anything is written, the logits are compared with the source's
(`inflate_check`).
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jobs.inflate_check import check
from jobs.inflate_model import FLAGS, inflate, widened_config
from streaminator.cli import main_program
from streaminator.config import ModelConfig
from streaminator.errors import ConfigError, ModelError, OutputError, first_line

# torch and transformers are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

# In the order of `FLAGS`, from the models' config.json.
SHAPES: dict[str, tuple[int, ...]] = {
    "smollm2-135m": (576, 30, 9, 3, 64, 1536),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192),
}


def main(argv: Sequence[str]) -> int:
    """Inflate a model; returns the exit code."""
    options = _parse(argv)
    output: Path = options.output.expanduser().absolute()
    _check_output(output)
    import torch
    from transformers import LlamaForCausalLM

    from streaminator.engine.checkpoint import check_model, load_model, load_tokenizer

    named = ModelConfig(model_name=options.model_name)
    check_model(named)
    source = load_model(named, torch.float64, "sdpa")
    if type(source) is not LlamaForCausalLM:
        name = source.config.model_type
        raise ModelError(f"--model_name {options.model_name}: a {name}, not a Llama; give a Llama")
    try:
        tokenizer = load_tokenizer(named)
    except ModelError as error:
        raise ModelError(f"--model_name {options.model_name}: has no tokenizer") from error
    config = widened_config(source.config, _wanted(options, source.config), options.like)
    dtype = getattr(torch, options.dtype)
    _check_disk(output, config, dtype)
    model = inflate(source, config, dtype, seed=options.seed)
    report = check(source, model, seed=options.seed)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _write(output, save)
    print(
        f"{output}: {model.num_parameters() / 1e6:.1f}M parameters in {options.dtype}, "
        f"the source has {source.num_parameters() / 1e6:.1f}M; {report}"
    )
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument ", "", 1))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m jobs.inflate",
        allow_abbrev=False,
        description="Make a trained Llama bigger without changing what it computes.",
    )
    parser.add_argument(
        "--model_name",
        "--model",
        required=True,
        metavar="SRC",
        help="hub name or folder of a small Llama; 'demo' is the bundled one",
    )
    parser.add_argument(
        "--like", choices=SHAPES, help="shape to take, but for the flags below (default: SRC's)"
    )
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new or empty folder"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    return parser.parse_args(argv)


def _wanted(options: argparse.Namespace, source: "LlamaConfig") -> dict[str, int]:
    """The size asked for by each flag."""
    own = [getattr(source, field) for field in FLAGS.values()]
    like = SHAPES.get(options.like, own)
    given = [getattr(options, flag) for flag in FLAGS]
    pairs = zip(FLAGS, given, like, strict=True)
    return {flag: size if size is not None else named for flag, size, named in pairs}


def _check_output(output: Path) -> None:
    try:
        is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be read ({error.strerror})") from error
    if is_taken:
        raise ConfigError(f"--output {output}: is there and not empty; give a new folder")


def _check_disk(output: Path, config: "LlamaConfig", dtype: "torch.dtype") -> None:
    """Raises: ConfigError when the weights would not fit."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        needed = LlamaForCausalLM(config).num_parameters() * dtype.itemsize
    existing = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"--output {output}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "give another disk, a smaller shape or --dtype bfloat16"
        )


def _write(output: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill `output`, which appears whole or not at all.

    Raises: OutputError.
    """
    from safetensors import SafetensorError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".inflate-") as folder:
            whole = Path(folder) / "model"
            save(whole)
            whole.replace(output)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--output {output}: cannot be written ({first_line(error)})") from error


if __name__ == "__main__":
    sys.exit(main_program("python -m jobs.inflate", main, advice="; nothing was written"))
