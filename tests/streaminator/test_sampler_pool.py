# SPDX-License-Identifier: Apache-2.0
"""A pool in one process: calls that keep what was learned, and weights that change in between."""

import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from streaminator import resident_session
from streaminator.config import (
    DataConfig,
    EngineConfig,
    JobConfig,
    ModelConfig,
    SamplingParams,
    SpeculatorConfig,
)
from streaminator.data.prompts import load_prompts
from streaminator.engine import engine as engine_module
from streaminator.engine.checkpoint import DEMO_MODEL, load_tokenizer
from streaminator.engine.weights import PackedWeights
from streaminator.errors import ConfigError, DataError, InputError, ModelError
from streaminator.resident_session import ResidentSession
from streaminator.sampler_pool import LocalWorkers, SamplerPool
from streaminator.sequence import Completion
from streaminator.speculative.draft_budget import StepCosts

CONFIG = JobConfig(
    model=ModelConfig(device="cpu", dtype="float32"),
    sampling=SamplingParams(max_length=24),
    data=DataConfig(num_samples=8, num_completions=3),
    engine=EngineConfig(stream_width=4),
)
TEXTS = [prompt.text for prompt in load_prompts(CONFIG.data, load_tokenizer(CONFIG.model))]


def demo_weights(noise: float = 0.0) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator) * weight.std()
    return model.state_dict()


def save_checkpoint(folder, weights) -> str:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    load_tokenizer(CONFIG.model).save_pretrained(folder)
    return str(folder)


def said(completions: list[list[Completion]]) -> list[list[tuple]]:
    """All that must not depend on what the pool did before."""
    return [
        [(c.token_ids, c.logprobs, c.text, c.finish_reason, c.sample_index) for c in of_prompt]
        for of_prompt in completions
    ]


def num_accepted(completions: list[list[Completion]], sample_index: int) -> int:
    return sum(sum(of_prompt[sample_index].accepted) for of_prompt in completions)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """Wider steps cost nothing, so that what is drafted does not depend on the machine."""
    monkeypatch.setattr(engine_module, "measure_step_costs", lambda *_, **__: StepCosts.free())


@pytest.fixture
def pool():
    with SamplerPool(CONFIG) as pool:
        yield pool


@pytest.fixture(scope="module")
def new_weights() -> dict[str, torch.Tensor]:
    return demo_weights(noise=0.05)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, new_weights) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), new_weights)


@pytest.fixture(scope="module")
def fresh(checkpoint) -> list[list[tuple]]:
    """What a pool says that never had other weights."""
    return said(SamplerPool(with_model(checkpoint)).sample(TEXTS, seed=2))


def with_model(name: str) -> JobConfig:
    return replace(CONFIG, model=replace(CONFIG.model, model_name=name))


@pytest.mark.parametrize("kind", ["state dict", "another type", "folder"])
def test_after_an_update_it_says_what_a_fresh_one_says(pool, kind, new_weights, checkpoint, fresh):
    first = said(pool.sample(TEXTS, seed=2))
    assert first != fresh
    if kind == "state dict":
        pool.update_weights(new_weights)
    elif kind == "folder":
        pool.update_weights(checkpoint)
    else:
        pool.update_weights({name: w.double() for name, w in new_weights.items()})
    assert said(pool.sample(TEXTS, seed=2)) == fresh
    pool.update_weights("demo")
    assert said(pool.sample(TEXTS, seed=2)) == first


@pytest.mark.parametrize("speculator", ["memory", "ngram"])
def test_an_epoch_begins_with_what_earlier_ones_said(speculator):
    # Without the tier that all prompts share and that outlives them anyway.
    own = SpeculatorConfig(speculator=speculator, shared_memory=False)
    pool = SamplerPool(replace(CONFIG, speculator=own))
    epochs = [pool.sample(TEXTS, seed=epoch) for epoch in range(2)]
    assert num_accepted(epochs[1], 0) > 1.2 * num_accepted(epochs[0], 0)
    pool.update_weights(demo_weights(noise=0.01))
    assert num_accepted(pool.sample(TEXTS, seed=2), 0) > 1.2 * num_accepted(epochs[0], 0)


def test_the_order_and_company_of_prompts_change_nothing(pool):
    together = said(pool.sample(TEXTS, seed=1))
    backwards = said(pool.sample(TEXTS[::-1], seed=1))
    assert backwards[::-1] == together
    assert said(pool.sample(TEXTS[3:4], seed=1)) == together[3:4]
    assert said(pool.sample(TEXTS, seed=0)) != together


def test_longer_prompts_in_a_later_call_have_room(pool):
    alone = said(pool.sample([TEXTS[0]], seed=1))
    short = [prompt[:4] for prompt in TEXTS]
    pool.sample(short)
    pool.sample([" ".join(TEXTS)[:2000]])
    assert said(pool.sample([TEXTS[0]], seed=1)) == alone


def test_one_prompt_given_twice_is_drawn_twice(pool):
    first, second, other = pool.sample([TEXTS[0], TEXTS[0], TEXTS[1]])
    assert len({completion.prompt.prompt_id for completion in (*first, *second, *other)}) == 3
    assert [c.token_ids for c in first] != [c.token_ids for c in second]
    assert said([first]) == said(pool.sample([TEXTS[0]]))


def test_text_token_ids_and_names(pool):
    token_ids = load_tokenizer(CONFIG.model)(TEXTS[0])["input_ids"]
    named = {"prompt_id": "a", "prompt": TEXTS[0]}
    (drawn,) = pool.sample([named])
    assert drawn[0].prompt.prompt_id == "a"
    assert said([drawn]) == said(pool.sample([named | {"prompt": token_ids}]))
    assert said([drawn]) == said(pool.sample([named | {"prompt": torch.tensor(token_ids)}]))
    assert said([drawn]) != said(pool.sample([named | {"prompt_id": "b"}]))
    assert pool.sample([]) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", "give a list"),
        (["a", ""], "prompt 1: has no tokens"),
        (None, "got a NoneType"),
        (["a", 3], "prompt 1: is a int"),
        (["a", "\ud800"], "prompt 1: has half a surrogate pair"),
        ([b"abc"], "prompt 0: is a bytes"),
        ([[True, False]], "prompt 0: is a list"),
        ([["a"]], "prompt 0: is a list"),
        ([{"text": "a"}], "prompt 0: has text"),
        ([{"prompt": "a", "id": "b"}], "prompt 0: has id, prompt"),
        ([{"prompt": "a", "prompt_id": 3}], "prompt_id 3: must be"),
        ([{"prompt": "a", "prompt_id": "b"}, {"prompt": "c", "prompt_id": "b"}], "prompt 0; make"),
    ],
)
def test_a_prompt_that_is_none_is_named(shared, prompts, message):
    with pytest.raises(DataError, match=message) as error:
        shared.sample(prompts)
    assert "\n" not in str(error.value)


def test_what_cannot_be_drawn_comes_back_failed(shared):
    failed, drawn = shared.sample([[10**6], TEXTS[0]])
    assert [c.finish_reason for c in failed] == ["failed"] * 3
    assert "vocabulary" in str(failed[0].error)
    assert all(c.token_ids and len(c.logprobs) == len(c.token_ids) for c in drawn)


@pytest.fixture(scope="module")
def shared():
    return SamplerPool(CONFIG)


class Sharded(torch.Tensor):
    pass


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w | {"model.extra": torch.ones(1)}, "no weight 'model.extra'"),
        (lambda w: {f"module.{n}": v for n, v in w.items()}, "no weight 'module.model.embed_tok"),
        (lambda w: {n: v for n, v in w.items() if n != NORM}, f"'{NORM}' is missing"),
        (lambda w: w | {NORM: torch.ones(3)}, rf"'{NORM}' has the shape \[3\]"),
        (lambda w: w | {NORM: w[NORM].to(torch.int8)}, f"'{NORM}' is torch.int8"),
        (lambda w: w | {NORM: w[NORM].as_subclass(Sharded)}, f"'{NORM}' is a Sharded"),
        (lambda w: w | {NORM: w[NORM].to("meta")}, f"'{NORM}' is a tensor without data"),
        (lambda w: w | {NORM: None}, f"'{NORM}' is a NoneType"),
        (lambda w: w | {NORM: w[NORM].to_sparse()}, rf"'{NORM}' is a Tensor \(torch.sparse_coo"),
        (lambda w: w | {"lm_head.weight": w["lm_head.weight"] + 1}, "ties the two"),
        (lambda w: list(w), "got a list"),
        (lambda w: "/no/such/folder", "update_weights /no/such/folder: no such folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(shared, new_weights, spoil, message):
    before = said(shared.sample(TEXTS[:2]))
    with pytest.raises(ModelError, match=message) as error:
        shared.update_weights(spoil(dict(new_weights)))
    assert "\n" not in str(error.value)
    assert said(shared.sample(TEXTS[:2])) == before


def test_a_checkpoint_that_lacks_a_weight_is_refused(shared, tmp_path, new_weights):
    from safetensors.torch import save_file

    folder = save_checkpoint(tmp_path, new_weights)
    kept = {n: v.clone() for n, v in new_weights.items() if n not in (NORM, "lm_head.weight")}
    save_file(kept, f"{folder}/model.safetensors", metadata={"format": "pt"})
    before = said(shared.sample(TEXTS[:2]))
    with pytest.raises(ModelError, match=f"{folder}: {NORM} is missing"):
        shared.update_weights(folder)
    assert said(shared.sample(TEXTS[:2])) == before


def test_of_tied_weights_one_is_enough(pool, new_weights, fresh):
    pool.update_weights({n: w for n, w in new_weights.items() if n != "lm_head.weight"})
    assert said(pool.sample(TEXTS, seed=2)) == fresh


def test_weights_do_not_change_under_a_completion(pool, new_weights, monkeypatch):
    before = said(pool.sample(TEXTS))
    refused = []

    def update() -> None:
        try:
            pool.update_weights(new_weights)
        except InputError as error:
            refused.append(str(error))

    runner = pool._workers._session._runner
    forward = runner.forward

    def forward_while_a_trainer_is_done(*arguments):
        thread = threading.Thread(target=update)
        thread.start()
        thread.join()
        return forward(*arguments)

    monkeypatch.setattr(runner, "forward", forward_while_a_trainer_is_done)
    assert said(pool.sample(TEXTS)) == before
    assert set(refused) == {"update_weights while sample is running: wait until it returns"}


def test_a_call_that_was_broken_off_leaves_nothing_behind(pool, new_weights, monkeypatch, fresh):
    before = said(pool.sample(TEXTS, seed=1))
    runner, num_left = pool._workers._session._runner, [7]
    forward = runner.forward

    def interrupted(*arguments):
        num_left[0] -= 1
        if not num_left[0]:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(runner, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.sample(TEXTS, seed=5)
    assert said(pool.sample(TEXTS, seed=1)) == before
    pool.update_weights(new_weights)
    assert said(pool.sample(TEXTS, seed=2)) == fresh


def test_a_prompt_given_up_between_two_completions_goes_on_elsewhere(pool):
    whole = said(pool.sample(TEXTS, seed=1))
    drawn, rest = {}, {}
    first = ResidentSession(CONFIG)
    first.open(seed=1, max_prompt_length=200)
    prompts = [of_prompt[0].prompt for of_prompt in pool.sample(TEXTS, seed=1)]
    result = first.work(prompts, max_seconds=0)
    while result.num_open_prompts:
        result = first.work([], num_to_release=9, max_seconds=60)
        keep(result, drawn)
        rest |= dict.fromkeys(result.released)
    for session in (first, ResidentSession(CONFIG)):  # back again, and to one that knows nothing
        session.open(seed=1, max_prompt_length=200)
        done = dict(drawn)
        left = []
        for prompt in prompts:
            indices = tuple(i for i in range(3) if (prompt.prompt_id, i) not in drawn)
            said_before = [drawn[key].token_ids for key in drawn if key[0] == prompt.prompt_id]
            left.append(
                replace(prompt, sample_indices=indices, finished=tuple(map(tuple, said_before)))
            )
        assert {prompt.prompt_id for prompt in left if prompt.sample_indices} == set(rest)
        result = session.work(left, max_seconds=60)
        keep(result, done)
        assert said([[done[p.prompt_id, i] for i in range(3)] for p in prompts]) == whole


def keep(result, drawn) -> None:
    for part in result.parts:
        drawn |= {(c.prompt.prompt_id, c.sample_index): c for c in part.completions}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_a_trainer_has_made_default_changes_nothing(shared, dtype):
    expected = said(shared.sample(TEXTS[:3]))
    torch.set_default_dtype(dtype)
    try:
        fresh = SamplerPool(CONFIG)
        with torch.device("meta"):
            drawn, drawn_first = (said(pool.sample(TEXTS[:3])) for pool in (shared, fresh))
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn == drawn_first == expected


class Closing(LocalWorkers):
    """Workers whose pool another thread closes while they draw, and which are gone then."""

    pool: SamplerPool | None = None

    def begin(self, **options):
        if self.pool is None:
            return super().begin(**options)
        thread = threading.Thread(target=self.pool.close)
        thread.start()
        thread.join()
        raise KeyError("a worker that is gone")


def test_a_pool_that_is_closed_in_a_call_says_so_and_stays_closed():
    workers = []
    pool = SamplerPool(CONFIG, lambda config: workers.append(Closing(config)) or workers[0])
    assert pool.sample(TEXTS[:1])
    workers[0].pool = pool
    with pytest.raises(InputError, match="sample: the pool was closed meanwhile"):
        pool.sample(TEXTS[:1])
    for call in (lambda: pool.sample(TEXTS[:1]), lambda: pool.update_weights("demo")):
        with pytest.raises(InputError, match="the pool is closed; make another one"):
            call()


def test_views_of_the_same_memory_travel_as_what_they_are():
    weight = torch.arange(9.0).view(3, 3)
    weights = {"a": weight, "b": weight.t(), "c": weight}
    packed = PackedWeights.of(weights)
    assert packed.arrays["c"][0] is packed.arrays["a"][0]  # once
    for name, value in packed.unpack().items():
        assert torch.equal(value, weights[name])


def test_the_callers_threads_are_left_as_they_were(shared):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        shared.sample(TEXTS[:1])
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, speculator=SpeculatorConfig(warm_start="run")),
        replace(CONFIG, data=DataConfig(stop_when_settled=0.9)),
    ],
)
def test_settings_without_effect_are_refused(config):
    with pytest.raises(ConfigError, match="SamplerPool has no use for it"):
        SamplerPool(config)


@pytest.mark.parametrize("speculator", ["memory", "ngram"])
def test_what_is_remembered_of_prompts_is_bounded(monkeypatch, speculator):
    monkeypatch.setattr(resident_session, "NUM_KEPT_PROMPTS", 3)
    pool = SamplerPool(replace(CONFIG, speculator=SpeculatorConfig(speculator=speculator)))
    sizes = []
    for epoch in range(6):
        pool.sample([f"Question {epoch} {n}:" for n in range(4)], seed=epoch)
        store = pool._workers._session._engine.store
        assert len(store._kept) == 3
        sizes.append(store._memory.num_prompts if speculator == "memory" else store.num_bytes)
    assert sizes[-1] < 2 * sizes[0]


def test_a_memory_too_small_for_all_prompts_forgets_and_changes_nothing(pool):
    config = replace(CONFIG, speculator=SpeculatorConfig(speculator_memory=1))
    forgetful = SamplerPool(config)
    prompts = [f"{n} {TEXTS[n % 8]}" for n in range(24)]
    for epoch in range(2):
        expected = said(pool.sample(prompts, seed=epoch))
        assert said(forgetful.sample(prompts, seed=epoch)) == expected
    memory = forgetful._workers._session._engine.store._memory
    assert memory.num_bytes <= 1 << 20
    assert not all(map(memory.has_table, memory._tables.of))
