from __future__ import annotations

import json
import math
import os
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    SignedManifest,
    parse_draft,
    parse_json,
    parse_run_id,
    sign,
)
from potluck.dht.template import PRESETS, load_toml, preset_draft, template_toml
from potluck.errors import ManifestError
from potluck.net.identity import peer_id_of

from dht_world import OTHER_RUN, identity

NOW = 1.7e9


def manifest(**overrides) -> Manifest:
    draft = preset_draft("demo", "a run", {k.replace("__", "."): v for k, v in overrides.items()})
    return draft.finish(identity(0).peer_id, created=NOW, genesis=NOW + 10)


def problem(**overrides) -> str:
    with pytest.raises(ManifestError) as caught:
        manifest(**overrides)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_template_reads_back_as_its_preset(preset, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(template_toml(preset, "x", {"rounds.steps": 7}))
    draft = load_toml(path)
    assert draft == preset_draft(preset, "x", {"rounds.steps": 7})
    finished = draft.finish(identity(0).peer_id, created=NOW, genesis=NOW, initial_state="ab" * 32, initial_bytes=5)
    signed = sign(finished, identity(0))
    assert SignedManifest.decode(signed.envelope, signed.run_id).manifest == finished


def test_every_setting_of_a_template_is_explained() -> None:
    lines = template_toml("demo", "x").splitlines()
    in_config = False
    for before, line in pairwise(lines):
        in_config = line == "[model.config]" or (in_config and not line.startswith("["))
        if " = " in line and not line.startswith("#") and not in_config:
            assert before.startswith("# "), line


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_any_text_survives_the_template(text) -> None:
    draft = preset_draft("demo", "x", {"data.source": "text:" + text.replace("\n", " ")})
    assert parse_draft(tomllib.loads(template_toml("demo", "x", {"data.source": draft.data.source}))) == draft


def test_the_run_id_is_checked_against_the_invite() -> None:
    signed = sign(manifest(), identity(0))
    assert len(signed.run_id) == 52
    with pytest.raises(ManifestError, match=r"belongs to run .* the invite names"):
        SignedManifest.decode(signed.envelope, OTHER_RUN)


def test_a_manifest_signed_by_another_is_refused() -> None:
    with pytest.raises(ManifestError, match="organizer"):
        sign(manifest(), identity(1))
    version, text, _, _ = msgspec.msgpack.decode(sign(manifest(), identity(0)).envelope)
    thief = identity(1)
    stolen = [version, text, thief.public_key, thief.sign(b"potluck.manifest.1" + text)]
    with pytest.raises(ManifestError, match="signed by"):
        SignedManifest.decode(msgspec.msgpack.encode(stolen))


def test_a_changed_manifest_is_refused() -> None:
    version, text, key, signature = msgspec.msgpack.decode(sign(manifest(), identity(0)).envelope)
    changed = text.replace(b'"steps":10', b'"steps":99')
    assert changed != text
    with pytest.raises(ManifestError, match="signature"):
        SignedManifest.decode(msgspec.msgpack.encode([version, changed, key, signature]))
    with pytest.raises(ManifestError, match="version 2"):
        SignedManifest.decode(msgspec.msgpack.encode([2, text, key, signature]))


@given(st.data())
def test_mutated_bytes_raise_nothing_but_manifest_errors(data) -> None:
    good = sign(manifest(), identity(0)).envelope
    mutated = bytearray(good)
    mutated[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(mutated), good[: data.draw(st.integers(0, len(good) - 1))], data.draw(st.binary())):
        with pytest.raises(ManifestError):
            SignedManifest.decode(bad)


def test_an_oversized_manifest_is_refused_unparsed() -> None:
    with pytest.raises(ManifestError, match="allowed 65536"):
        SignedManifest.decode(b"\x91" * (MAX_MANIFEST_BYTES + 1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(
        ["", "model", "model.config", "rounds.seconds", "training.betas", "codec.parameters", "data.source"]
    ),
)
def test_any_value_anywhere_is_read_or_refused_clearly(value, where) -> None:
    fields = json.loads(manifest().to_json())
    table = fields
    *parents, last = where.split(".") if where else ["name"]
    for parent in parents:
        table = table[parent]
    table[last] = value
    try:
        parse_json(json.dumps(fields).encode())
    except ManifestError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rounds__seconds": 1}, r"rounds\.seconds is 1: .*greater than or equal to 2"),
        (
            {"rounds__exchange_seconds": 2.5},
            r"rounds: exchange_seconds is 2\.5, allowed less than 2\.5: half of rounds\.seconds",
        ),
        (
            {"rounds__overlap": True, "rounds__exchange_seconds": 5.0},
            r"exchange_seconds is 5, allowed less than",
        ),
        ({"rounds__overlap": True, "model__stages": 2}, r"rounds\.overlap is for data-parallel runs"),
        ({"rounds__overlap": True, "incentives__validators": [peer_id_of(bytes(32))]}, r"rounds\.overlap does not go"),
        ({"rounds__stream": 2, "incentives__validators": [peer_id_of(bytes(32))]}, r"rounds\.stream does not go"),
        ({"rounds__stream": 2, "rounds__exchange": "sliced"}, r"rounds\.stream goes with rounds\.exchange"),
        ({"rounds__speed": 1}, r"rounds\.speed is unknown, allowed here: seconds, steps"),
        ({"colour": 1}, r"colour is unknown, allowed here: version, name"),
        ({"round": 1}, r"round is unknown \(do you mean rounds\?\), allowed here: version, name"),
        ({"codec": "int8"}, r"codec is 'int8', but has settings of its own: name, parameters"),
        ({"incentives__validators": "me"}, r"incentives\.validators is 'me': write a list"),
        ({"codec__parameters__beta": math.nan}, r"^codec\.parameters\.beta is nan: input should be a finite number$"),
        ({"version": 2}, r"version is 2, this program knows version 1"),
        ({"training__optimizer": "sgd"}, r"training\.optimizer is 'sgd': .*'adamw'"),
        ({"training__learning_rate": math.nan}, r"training\.learning_rate is nan"),
        ({"training__warmup_steps": 3000}, r"warmup_steps is 3000, allowed at most total_steps, which is 2000"),
        ({"data__source": "http://x"}, r"data\.source is 'http://x': allowed are python-stdlib, text:PATH and hf:NAME"),
        ({"data__sequence_length": 1024}, r"data\.sequence_length is 1024, allowed at most .*, which is 512"),
        (
            {"model__stages": 2},
            r"tie_word_embeddings is true, .*set it to false",
        ),
        ({"model__stages": 5}, r"model\.stages is 5, allowed at most the number of layers .*, which is 4"),
        ({"model__config__vocab_size": 100}, r"vocab_size is 100, allowed at least 256"),
        (
            {"model__config__num_hidden_layers": 1_000_000},
            r"num_hidden_layers is 1000000, allowed at most 1024",
        ),
        ({"model__config__n_layer": 2000}, r"n_layer is 2000"),
        ({"model__config__depth": 2000}, r"depth is 2000"),
        ({"model__config__hidden_size": 2**24 + 1}, r"hidden_size is 16777217, allowed at most 16777216"),
        ({"model__config__rope_theta": math.inf}, r"rope_theta is inf"),
        ({"model__config__rope_scaling": {"a": 1}}, r"rope_scaling is a dict"),
        ({"model__config__sizes": [1] * 257}, r"sizes has 257 values"),
        ({"model__config__auto_map": "x"}, r"auto_map is not allowed"),
        ({"model__config__attn_implementation": "x"}, r"attn_implementation is not allowed"),
        ({"model__config__experts_implementation": "x"}, r"experts_implementation is not allowed"),
        ({"model__config__quantization_config": "x"}, r"quantization_config is not allowed"),
        ({"model__config__torch_dtype": "x"}, r"torch_dtype is not allowed"),
        ({"model__config__trust_remote_code": True}, r"trust_remote_code is not allowed"),
        ({"model__config___name_or_path": "x"}, r"model\.config\._name_or_path"),
        ({"model__family": "../x"}, r"model\.family is '\.\./x'"),
        ({"codec__name": "zip file"}, r"codec\.name is 'zip file': allowed are small letters"),
        ({"incentives__validators": ["me"]}, r"incentives\.validators\.0 is 'me': a peer's id begins with 12D3KooW"),
        ({"incentives__validators": 2 * [peer_id_of(bytes(32))]}, r"names a peer twice"),
    ],
)
def test_each_bad_setting_is_named_with_what_is_allowed(overrides, expected) -> None:
    text = problem(**{k.replace("config___name", "config._name"): v for k, v in overrides.items()})
    assert re.search(expected, text), text
    assert "pydantic" not in text


def test_every_problem_gets_its_line() -> None:
    lines = problem(rounds__seconds=1, training__batch_size=0).splitlines()
    assert len(lines) == 2


def test_unknown_codecs_are_named() -> None:
    manifest().check_known(codecs={"none", "int8"})
    with pytest.raises(ManifestError, match=r"codec\.name is 'int8', this program knows none"):
        manifest().check_known(codecs={"none"})


def test_a_mistyped_genesis_is_refused() -> None:
    draft = preset_draft("demo", "x")
    with pytest.raises(ManifestError, match="genesis"):
        draft.finish(identity(0).peer_id, created=NOW, genesis=NOW * 1000)


def test_files_that_are_no_manifest_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ManifestError, match=r"run\.toml: No such file"):
        load_toml(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ManifestError, match="No such file"):  # reading it would wait for ever
        load_toml(tmp_path / "pipe")
    path.write_bytes(b"\xff\xfe = ")
    with pytest.raises(ManifestError, match="not TOML"):
        load_toml(path)
    path.write_text("[rounds]\nseconds = 0\n")
    with pytest.raises(ManifestError, match=r"run\.toml: rounds\.seconds"):
        load_toml(path)
    path.write_text("#" * 70_000)
    with pytest.raises(ManifestError, match="larger than"):
        load_toml(path)


@pytest.mark.parametrize("text", ["", "a" * 51, "a" * 53, "A" * 52, "1" * 52, "a" * 51 + "\n"])
def test_bad_run_ids_are_refused(text) -> None:
    with pytest.raises(ManifestError, match="52 characters"):
        parse_run_id(text)
