# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmark's engines: each is a program, and none can be fast and wrong."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import roofline
from jobs.benchmark_check import Checker
from jobs.benchmark_report import overview
from jobs.engines import registry
from jobs.engines.client import Client, EngineFailedError
from jobs.engines.protocol import Draw, Load, Run
from jobs.engines.registry import OPENVINO, PEERS, Program, find_programs
from streaminator.config import JobConfig, ModelConfig, SamplingParams
from streaminator.engine.model_runner import ModelRunner
from tests.fakes import PROMPTS, VOCAB_SIZE, load_runner, save_model
from tests.jobs.test_benchmark import make_inputs, run

# A peer that answers at once, with tokens that nobody asked a model for.
PEER = """
import sys
from jobs.engines.protocol import Run, serve

def load(what):
    if {fails!r}:
        print("a library's chatter")
        raise RuntimeError("no such thing\\nas this")
    def draw(draw):
        tokens = [(7 * i + {first}) % {size} for i in range(draw.max_length - {missing})]
        rows = [[tokens] * draw.num_completions for _ in draw.prompts]
        return Run(completions=rows, seconds=1e-3)
    return draw

serve(load)
"""


def write_peer(folder: Path, *, fails: bool = False, missing: int = 0, size: int = 10) -> str:
    path = folder / "peer.py"
    path.write_text(PEER.format(fails=fails, missing=missing, size=size, first=1))
    return str(path)


def make_load(model: Path, **settings: float) -> Load:
    config = JobConfig(
        sampling=SamplingParams(**({"temperature": 0.0, "max_length": 12} | settings)),
        model=ModelConfig(model_name=str(model), dtype="float64", device="cpu"),
    )
    return Load(
        engine="plain",
        model=str(model),
        dtype="float64",
        device="cpu",
        num_threads=1,
        stream_width=2,
        max_prompt_length=64,
        end_token_ids=(),
        settings=config.flat(),
    )


def make_draw(num_prompts: int = 3, num_completions: int = 2) -> Draw:
    prompts = tuple(tuple(prompt.token_ids) for prompt in PROMPTS[:num_prompts])
    names = tuple(str(place) for place in range(num_prompts))
    return Draw(
        prompt_ids=names, prompts=prompts, num_completions=num_completions, max_length=12, seed=0
    )


SLOW_PEER = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEERS.is_dir(), reason="takes a minute; `make bench-peers` allows it"),
]


@pytest.mark.parametrize(
    "names",
    [
        ("plain", "ngram", "memory", "transformers"),
        pytest.param(("transformers-batch",), marks=SLOW_PEER),
    ],
    ids=",".join,
)
def test_engines_draw_what_the_model_says(tmp_path, names):
    folder = save_model(tmp_path, "Llama")
    load, draw = make_load(folder), make_draw()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    checker = Checker(model, SamplingParams(temperature=0.0), [], "float64")
    with ExitStack() as stack:
        # All at once: most of it is importing.
        clients = [
            stack.enter_context(Client(program, replace(load, engine=program.name)))
            for program in find_programs(names)[0]
        ]
        for client in clients:
            name = client.program.name
            assert set(client.load()) >= {"torch", "transformers"}, name
            first, second = (client.draw(draw, 300) for _ in range(2))
            verdict = checker.check(draw, [first, second])
            assert verdict.is_correct, (name, verdict.problems)
            assert verdict.mean_length == 12
            assert first.completions == second.completions
            assert first.num_tokens == 3 * 2 * 12
            if name in ("ngram", "memory"):
                # How much the memory drafts depends on the machine.
                assert first.num_drafted or name == "memory"
                num_rejected = first.num_drafted - first.num_accepted
                assert first.num_sampled_tokens == 3 * 2 * 12 + num_rejected


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_fast_peer_with_wrong_text_is_marked_and_has_no_ratio(
    tmp_path, monkeypatch, capsys, temperature
):
    flags = ["--engines", f"plain,memory,{write_peer(tmp_path)}", "--temperature", temperature]
    flags += ["--num_completions", "2", "--max_length", "24", "--repeats", "1"]
    code, result = run(monkeypatch, capsys, *make_inputs(tmp_path), *flags)
    assert code == 0
    (name,) = set(result["engines"]) - {"plain", "memory"}
    assert not result["engines"][name]["check"]["is_correct"]
    assert (
        result["engines"][name]["tokens_per_second"]
        > result["engines"]["plain"]["tokens_per_second"]
    )
    assert result["reference"] == "plain"
    assert list(result["ratios"]) == ["memory/plain"]


def test_the_table_says_wrong_and_why(tmp_path, monkeypatch, capsys):
    flags = ["--engines", f"plain,{write_peer(tmp_path, missing=1)}", "--repeats", "1"]
    flags += ["--num_completions", "1", "--max_length", "8", "--widths", "2,3"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *make_inputs(tmp_path), *flags])
    from jobs.benchmark import main

    assert main(sys.argv[1:]) == 0
    out = capsys.readouterr().out.splitlines()
    peer = str(tmp_path / "peer.py")
    assert f"{peer} is wrong: a completion stops without an end-of-text token" in out
    rows = [line for line in out if line.startswith(peer) and line.endswith("  wrong")]
    assert len(rows) == 2
    (row,) = (
        line
        for line in out
        if line.startswith(peer) and line.split()[1:] == ["wrong", "wrong", "-"]
    )
    assert row


def test_engines_are_compared_at_the_best_width_of_each():
    def result(width, **speeds):
        check = {name: {"is_correct": speed > 0} for name, speed in speeds.items()}
        return {
            "stream_width": width,
            "engines": {
                name: {"tokens_per_second": abs(speed), "check": check[name]}
                for name, speed in speeds.items()
            },
        }

    # At 8, vllm is fastest and wrong.
    results = [result(4, plain=10, memory=30, vllm=20), result(8, plain=40, memory=35, vllm=-99)]
    assert overview(results).splitlines()[-3:] == [
        "Each at its best width, to vllm",
        f"{'plain':34}   2.00",
        f"{'memory':34}   1.75",
    ]


def test_an_engine_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    peer = write_peer(tmp_path, fails=True)
    flags = ["--engines", f"plain,{peer}", "--repeats", "1", "--num_completions", "1"]
    code, result = run(monkeypatch, capsys, *make_inputs(tmp_path), *flags, "--max_length", "4")
    assert code == 0
    assert list(result["engines"]) == ["plain"]
    assert result["failed"][peer].startswith("RuntimeError: no such thing")


def test_a_missing_environment_is_one_line_with_how_to_build_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry._PROGRAMS, "vllm", ("vllm_peer", tmp_path / ".venv-peers"))
    flags = ["--engines", "plain,vllm", "--repeats", "1", "--num_completions", "1"]
    monkeypatch.setattr(
        sys, "argv", ["benchmark", *make_inputs(tmp_path), *flags, "--max_length", "4"]
    )
    from jobs.benchmark import main

    assert main(sys.argv[1:]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "vllm" in line]
    assert lines == [
        "vllm is left out: no environment .venv-peers; build it with `make bench-peers`"
    ]
    assert any(line.split()[:2] == ["vllm", "-"] for line in captured.out.splitlines())


def test_an_engine_that_does_not_answer_in_time_is_given_up(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import sys\nsys.stdin.read()\n")
    load = make_load(tmp_path)
    with (
        Client(Program("slow", (sys.executable, str(path)), {}), load) as client,
        pytest.raises(EngineFailedError, match=r"no answer within 0 s"),
    ):
        client.draw(make_draw(), 0.1)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('the disk is full')", "it ended: the disk is full"),
        ("import os; os.kill(os.getpid(), 9)", r"it ended: by signal 9 \(out of memory\?\)"),
        ("import os; os._exit(3)", "it ended: exit code 3"),
    ],
)
def test_an_engine_that_ends_is_quoted(tmp_path, program, message):
    path = tmp_path / "broken.py"
    path.write_text(program)
    with (
        Client(Program("broken", (sys.executable, str(path)), {}), make_load(tmp_path)) as client,
        pytest.raises(EngineFailedError, match=message),
    ):
        client.load()


def test_text_of_another_temperature_is_not_the_models(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "Llama"), dtype=torch.float64)
    draw = make_draw(num_completions=40)
    run = Run(completions=[])
    torch.manual_seed(0)
    for prompt in draw.prompts:
        drawn = model.generate(
            torch.tensor([prompt] * draw.num_completions),
            max_new_tokens=draw.max_length,
            do_sample=True,
            temperature=0.8,
            top_k=0,
        )
        run.completions.append(drawn[:, len(prompt) :].tolist())

    def problems(**sampling: float) -> list[str]:
        params = SamplingParams(**sampling)
        return Checker(model, params, [], "float64").check(draw, [run]).problems

    assert problems(temperature=0.8) == []
    for other in ({"temperature": 0.6}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}):
        assert problems(**other)[0].startswith("not the model's text: ")


def test_completions_that_end_too_early_are_not_the_models(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "Llama"), dtype=torch.float64)
    draw = make_draw(num_completions=20)
    # Ends where the model would hardly ever end.
    run = Run(completions=[[[0]] * draw.num_completions for _ in draw.prompts])
    checker = Checker(model, SamplingParams(temperature=1.0), [0], "float64")
    assert any(
        "not the model's length" in problem for problem in checker.check(draw, [run]).problems
    )


def test_a_steps_bytes_and_operations_are_counted_by_hand():
    shape = roofline.Shape(body=1000, head=200, itemsize=2, kv_bytes=8, attended=16)
    machine = roofline.Machine(copy_rate=1e4, matmul_rate=1e5)
    run = Run(
        seconds=4.0,
        num_steps=2,
        num_prefill_tokens=3,
        num_sampled_tokens=5,
        num_read_tokens=10,
        num_attended_tokens=20,
    )
    limit = roofline.roofline(run, shape, machine)
    assert limit is not None
    assert limit.seconds_per_step == 2.0
    assert limit.bytes_per_step == (2 * 1200 * 2 + (10 + 3 + 5) * 8) / 2
    assert limit.flops_per_step == (2 * 1000 * 8 + 2 * 200 * 5 + 16 * 20) / 2
    assert limit.share_of_copy == pytest.approx(limit.bytes_per_step / 2.0 / 1e4)
    assert limit.share_of_matmul == pytest.approx(limit.flops_per_step / 2.0 / 1e5)
    assert limit.share == limit.share_of_copy
    assert roofline.roofline(Run(seconds=1.0), shape, machine) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_shape_counts_what_multiplies(tmp_path, tied):
    runner = load_runner(save_model(tmp_path, "Llama", tie_word_embeddings=tied), "float64")
    shape = roofline.model_shape(runner)
    assert shape is not None
    # 2 layers of width 32: q, k, v, o with 4 heads and 2 KV heads of 8; gate, up, down to 48.
    assert shape.body == 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert shape.head == VOCAB_SIZE * 32
    assert shape.itemsize == 8
    assert shape.kv_bytes == 2 * 2 * (8 + 8) * 8
    assert shape.attended == 2 * 4 * 2 * (8 + 8)


def test_a_mixture_has_no_roofline(tmp_path):
    folder = save_model(tmp_path, "Qwen3-MoE", dtype=torch.float32)
    runner = ModelRunner(ModelConfig(model_name=str(folder), dtype="float32", device="cpu"))
    assert roofline.model_shape(runner) is None


@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["0", "0.8"])
@pytest.mark.parametrize(
    ("name", "home"), [("vllm", PEERS), ("openvino", OPENVINO), ("openvino-lookup", OPENVINO)]
)
def test_a_peer_draws_what_the_model_says(monkeypatch, capsys, name, home, temperature):
    if not home.is_dir():
        pytest.skip(f"no {home.name}; `make bench-peers` builds it")
    flags = ["--engines", f"plain,{name}", "--temperature", temperature, "--num_samples", "3"]
    flags += ["--num_completions", "2", "--max_length", "16", "--stream_width", "2"]
    code, result = run(monkeypatch, capsys, *flags, "--repeats", "1", "--dtype", "float32")
    assert code == 0
    assert result["failed"] == {}
    assert result["engines"][name]["check"]["is_correct"]
    assert result["reference"] == name
