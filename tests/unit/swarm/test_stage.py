"""Stages: the chain is the whole model, bit for bit, in values and gradients."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from potluck.dht.manifest import ModelPart
from potluck.errors import ManifestError, StateError
from potluck.swarm.layout import Layout
from potluck.swarm.model import build_module, count_parameters, next_token_loss, transformers_config
from potluck.swarm.stage import (
    Stage,
    build_stage,
    hidden_size,
    join_stages,
    layer_ranges,
    stage_layout,
    stage_names,
    stage_parameters,
    stage_work,
)

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 4}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 32}
GPT2["tie_word_embeddings"] = False
OPT = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 24}

#: Every family verified, each small. Dropout is the family's default: gpt2, opt and bloom have some.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt2": GPT2,
    "gpt_neox": SMALL,
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "phi": SMALL,
    "olmo2": SMALL,
    "opt": {**OPT, "layerdrop": 0.0},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 5, "n_head": 4, "tie_word_embeddings": False},
    "ctrl": {**GPT2, "dff": 48},  # changes its input embeddings in place
    "mixtral": {**GROUPED, "num_local_experts": 4, "sliding_window": None},
}


def spec_of(family: str = "llama", stages: int = 3, **config: Any) -> ModelPart:
    return ModelPart(family=family, config={**FAMILIES.get(family, {}), **config}, seed=7, stages=stages)


def stages_of(spec: ModelPart) -> list[Stage]:
    return [build_stage(spec, name) for name in stage_names(spec.stages)]


def whole_of(spec: ModelPart, stages: list[Stage]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    whole: nn.Module = AutoModelForCausalLM.from_config(transformers_config(spec), dtype=torch.float32)
    whole.load_state_dict(join_stages(spec, states_of(stages)), strict=True)
    return whole


def states_of(stages: list[Stage]) -> dict[str, dict[str, Tensor]]:
    return {f"stage.{k}": dict(stage.state_dict()) for k, stage in enumerate(stages)}


def tokens(sequences: int = 3, length: int = 13) -> Tensor:
    return torch.randint(2, 64, (sequences, length), generator=torch.Generator().manual_seed(0))


def through(stages: list[Stage], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


def digest(module: nn.Module) -> str:
    return hashlib.sha256(Layout.of_module(module).gather(module).tobytes()).hexdigest()


def in_another_process(code: str) -> str:
    """What it prints, with this file's directory to import from."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()


# ---- cutting ------------------------------------------------------------------------------------------------


@given(st.integers(1, 300).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_layers_are_cut_into_contiguous_balanced_ranges(cut: tuple[int, int]) -> None:
    layers, stages = cut
    ranges = layer_ranges(layers, stages)
    assert [i for part in ranges for i in part] == list(range(layers))
    sizes = [len(part) for part in ranges]
    assert len(sizes) == stages and max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)
    assert stages < 3 or sizes[0] == min(sizes) or min(sizes[1:-1]) == max(sizes)


@given(st.integers(0, 50), st.integers(-2, 100))
def test_a_stage_without_a_layer_is_refused(layers: int, stages: int) -> None:
    if not 1 <= stages <= layers:
        with pytest.raises(ManifestError, match=r"model\.stages"):
            layer_ranges(layers, stages)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stages_share_out_the_whole_models_parameters(stages: int) -> None:
    spec = spec_of(stages=stages)
    parts = stages_of(spec)
    names = [name for part in parts for name, _ in part.named_parameters()]
    whole = whole_of(spec, parts)
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    assert len(names) == len(set(names))
    counts = stage_parameters(spec)
    assert sum(counts) == count_parameters(spec)
    assert counts == tuple(Layout.of_module(part).size for part in parts)
    assert "model.layers.4.mlp.up_proj.weight" in names and hidden_size(spec) == 32


# ---- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_is_the_whole_model(family: str, stages: int) -> None:
    spec = spec_of(family, stages)
    parts = stages_of(spec)
    whole = whole_of(spec, parts)
    batch = tokens()
    for training in (False, True):  # in training mode with the same dropout
        for module in (whole, *parts):
            module.train(training)
        torch.manual_seed(1)
        loss = next_token_loss(whole, batch)
        torch.manual_seed(1)
        ours = parts[-1].loss(through(parts[:-1], batch[:, :-1]), batch[:, 1:])
        assert torch.equal(loss, ours)
    loss.backward()
    ours.backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    got = {name: p.grad for part in parts for name, p in part.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_backward_may_cross_from_peer_to_peer(family: str) -> None:
    """Each stage's graph is its own: a server gets its input, and later the gradient of what it gave."""
    spec = spec_of(family)
    parts = [part.eval() for part in stages_of(spec)]
    batch = tokens()
    inputs, x = [], batch[:, :-1]
    for part in parts[:-1]:
        inputs.append(x)
        with torch.no_grad():
            x = part(x)
    last = x.clone().requires_grad_()
    loss = parts[-1].loss(last, batch[:, 1:])
    loss.backward()
    gradient = last.grad
    for part, x in zip(reversed(parts[:-1]), reversed(inputs), strict=True):
        x = x if part.first else x.clone().requires_grad_()
        part(x).backward(gradient)
        gradient = x.grad
    whole = whole_of(spec, parts).eval()
    next_token_loss(whole, batch).backward()
    for part in parts:
        for name, p in part.named_parameters():
            torch.testing.assert_close(p.grad, whole.get_parameter(name).grad, rtol=1e-5, atol=1e-8)


def test_a_stage_does_not_change_its_input_nor_keep_it() -> None:
    spec = spec_of("ctrl")
    middle = build_stage(spec, "stage.1").eval()
    x = torch.randn(2, 7, 32)
    before = x.clone()
    once = middle(x)
    assert torch.equal(x, before) and torch.equal(once, middle(x))
    assert torch.equal(once, copy.deepcopy(middle)(x))
    for length in (1, 32):
        assert middle(torch.randn(1, length, 32)).shape == (1, length, 32)


# ---- building -----------------------------------------------------------------------------------------------


def test_a_stage_has_the_same_bits_in_every_process() -> None:
    code = (
        "import torch; torch.rand(3); torch.set_num_threads(2)\n"
        "from test_stage import *\n"
        "print(digest(build_stage(spec_of('gpt2'), 'stage.1')))"
    )
    printed = in_another_process(code)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert printed == digest(build_module(spec_of("gpt2"), "stage.1"))
    assert torch.equal(torch.rand(1), drawn), "the caller's random state is left alone"


def test_stages_and_seeds_differ_in_their_weights() -> None:
    spec = spec_of()
    first, second = build_stage(spec, "stage.1"), build_stage(spec.model_copy(update={"seed": 8}), "stage.1")
    assert digest(first) != digest(second)
    weights = [next(p for n, p in part.named_parameters() if n.endswith("up_proj.weight")) for part in stages_of(spec)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_stages_are_initialized_as_the_family_does(family: str) -> None:
    spec = spec_of(family, vocab_size=256)
    whole = build_module(spec.model_copy(update={"stages": 1}))
    expected = {name: p for name, p in whole.named_parameters()}
    for part in stages_of(spec):
        for name, p in part.named_parameters():
            assert p.dtype == torch.float32 and p.requires_grad
            torch.testing.assert_close(p.std(), expected[name].std(), rtol=0.15, atol=1e-6)
            torch.testing.assert_close(p.mean(), expected[name].mean(), rtol=0, atol=0.005)
        for name, buffer in part.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name)), name


def test_only_the_slice_is_ever_in_memory() -> None:
    spec = spec_of(stages=32, num_hidden_layers=32, vocab_size=256, hidden_size=1024, intermediate_size=4096)
    assert count_parameters(spec) * 4 > 1.8e9
    code = (
        "import resource, torch\n"
        "from test_stage import *\n"
        "spec = spec_of(stages=32, num_hidden_layers=32, vocab_size=256, hidden_size=1024, intermediate_size=4096)\n"
        "build_stage(spec_of(), 'stage.1')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "build_stage(spec, 'stage.5')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)"
    )
    assert int(in_another_process(code)) < 3 * 4 * stage_parameters(spec)[5]


# ---- joining ------------------------------------------------------------------------------------------------


def test_states_that_do_not_fit_are_named() -> None:
    spec = spec_of()
    good = states_of(stages_of(spec))
    name = "model.layers.2.mlp.up_proj.weight"
    assert name in good["stage.1"]

    def joined(**changes: Any) -> dict[str, Tensor]:
        states = {**good, **{k.replace("_", "."): v for k, v in changes.items()}}
        return join_stages(spec, {k: v for k, v in states.items() if v is not None})

    with pytest.raises(StateError, match=r"stage\.1"):
        joined(stage_1=None)
    with pytest.raises(StateError, match=r"stage\.3"):
        joined(stage_3={})
    with pytest.raises(StateError, match="up_proj"):
        joined(stage_1={k: v for k, v in good["stage.1"].items() if k != name})
    with pytest.raises(StateError, match=r"stage\.1.*lm_head"):
        joined(stage_1={**good["stage.1"], "lm_head.weight": torch.zeros(64, 32)})
    with pytest.raises(StateError, match=r"up_proj.*\(3, 3\)"):
        joined(stage_1={**good["stage.1"], name: torch.zeros(3, 3)})


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}])
def test_tied_embeddings_are_refused_with_the_fix(config: dict[str, Any]) -> None:
    base = {k: v for k, v in GPT2.items() if k != "tie_word_embeddings"}
    spec = ModelPart(family="gpt2", config={**base, **config}, seed=1, stages=2)  # gpt2 ties by default
    for refused in (
        lambda: build_module(spec, "stage.0"),
        lambda: stage_parameters(spec),
        lambda: join_stages(spec, {}),
    ):
        with pytest.raises(ManifestError, match=r"model\.config\.tie_word_embeddings.*set it to false"):
            refused()


@pytest.mark.parametrize("module", ["stage.3", "stage.-1", "stage.01", "stage", ""])
def test_modules_out_of_range_are_refused(module: str) -> None:
    for stages in (1, 3):
        with pytest.raises(ManifestError, match="modules"):
            build_module(spec_of(stages=stages), module)


TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("opt", {**OPT, "layerdrop": 0.1}, "layerdrop"),
        ("big_bird", {**TINY, "tie_word_embeddings": False}, "big_bird cannot be cut"),
        ("cpmant", {**TINY, "tie_word_embeddings": False}, "cpmant cannot be cut"),
        ("apertus", {**GROUPED}, "does not initialize"),
    ],
)
def test_families_that_are_no_plain_chain_are_refused(family: str, config: dict[str, Any], why: str) -> None:
    with pytest.raises(ManifestError, match=why):
        for k in range(2):
            build_stage(ModelPart(family=family, config=config, seed=1, stages=2), f"stage.{k}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_stages_layout_is_known_without_building_it(family: str) -> None:
    spec = spec_of(family, stages=3)
    for name, stage in zip(stage_names(3), stages_of(spec), strict=True):
        assert stage_layout(spec, name) == Layout.of_module(stage)


def test_work_counts_the_head_and_no_lookups() -> None:
    work = stage_work(spec_of("llama", stages=3, num_hidden_layers=6, vocab_size=4096))
    assert sum(work) == pytest.approx(3)
    assert work[0] == work[1] < work[2]  # two layers each; the head is 32 x 4096 more
