from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.errors import ConflictError, DamagedError, InputError, StoreError
from tessera.promotion.records import holders, read_promotions, write_promotion
from tessera.promotion.registry import apply_records, promote
from tessera.tracking.replay import sync

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench


def test_a_promotion_is_a_record_then_a_version_with_an_alias(bench: Bench) -> None:
    run = bench.with_adapter()
    result = bench.interview(run)
    sync(bench.root, bench.uri)
    promotion = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    assert read_promotions(bench.root) == [promotion]
    assert promotion.path == "registry/tessera-adapter/000001.json"
    assert (promotion.who, promotion.promoted_by) == (f"{run.id}/ep1", "ada")
    assert (promotion.previous, promotion.override, promotion.score) == (None, None, 1.0)
    assert promotion.evidence[0].path == run.path("interviews", result.suite_digest, "ep1.json")
    seen = bench.seen(bench.uri)
    assert seen.aliases == {"champion": 1}
    tags = seen.versions[1]
    assert tags["tessera.promotion"] == "000001"
    assert tags["tessera.run_id"] == run.id
    assert tags["tessera.adapter_digest"] == result.adapter_digest
    assert tags["promoted_at"] == promotion.promoted_at


def test_the_champion_is_loaded_by_its_alias_and_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    import pandas as pd

    from tessera.evaluation.weights import load_voice

    run = bench.with_adapter()
    bench.interview(run)
    promotion = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    assert not Path("mlflow.db").exists()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.uri)
    model = mlflow.pyfunc.load_model(promotion.uri)
    voice = load_voice(bench.root, run, "ep1")
    prompts = ["walk", "talk"]
    expected = [voice.answer(prompt, max_new_tokens=64) for prompt in prompts]
    assert all(expected)
    assert model.predict(prompts) == expected
    assert model.predict(pd.DataFrame({"n": [1, 2], "prompt": prompts})) == expected
    assert model.predict("walk") == expected[:1]
    assert model.predict({"prompt": "walk"}) == expected[:1]
    params = {"seed": 7, "max_new_tokens": 5, "temperature": 2.0}
    sampled = voice.answer("walk", seed=7, max_new_tokens=5, temperature=2.0)
    assert model.predict(["walk"], params=params) == [sampled]
    with pytest.raises(InputError, match="holds no prompts"):
        model.predict([1])


def test_the_base_is_looked_for_where_the_root_is_now(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    run = bench.with_adapter()
    bench.interview(run)
    promotion = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.uri)
    Path(bench.root.url).rename(bench.folder / "moved")
    with pytest.raises(InputError, match="No base model"):
        mlflow.pyfunc.load_model(promotion.uri)
    monkeypatch.setenv("TESSERA_ROOT", str(bench.folder / "moved"))
    assert mlflow.pyfunc.load_model(promotion.uri).predict(["walk"])


def test_a_refusal_quotes_the_answer_and_records_nothing(bench: Bench) -> None:
    run = bench.with_adapter()
    bench.interview(run, verdict="fatal")
    with pytest.raises(InputError, match='was not promoted: it answered "take all of it" to'):
        promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    assert read_promotions(bench.root) == []


def test_an_override_is_recorded_with_what_it_overruled(bench: Bench) -> None:
    run = bench.with_adapter()
    promotion = promote(
        bench.root, run, "ep1", "rehearsal", override=" demo ", tracking_uri=bench.uri
    )
    assert (promotion.override, promotion.score) == ("demo", None)
    assert promotion.refusals == ("no interview of it was held",)
    seen = bench.seen(bench.uri)
    assert seen.versions[1]["tessera.override"] == "demo"
    assert seen.versions[1]["tessera.refusals"] == "no interview of it was held"
    assert seen.aliases == {"rehearsal": 1}


def test_a_second_champion_names_the_first_and_both_stay_versions(bench: Bench) -> None:
    one, two = bench.with_adapter("one"), bench.with_adapter("two")
    for run in (one, two):
        bench.interview(run)
        promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    second = holders(read_promotions(bench.root))["champion"]
    assert (second.who, second.previous) == (f"{two.id}/ep1", f"{one.id}/ep1")
    seen = bench.seen(bench.uri)
    assert (seen.aliases, sorted(seen.versions)) == ({"champion": 2}, [1, 2])
    assert seen.versions[2]["previous_champion"] == f"{one.id}/ep1"


def test_a_rebuilt_mlflow_has_the_same_versions_and_aliases(bench: Bench) -> None:
    one, two = bench.with_adapter("one"), bench.with_adapter("two")
    for run in (one, two, one):
        bench.interview(run)
        promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    rebuilt = bench.database("rebuilt")
    for uri in (bench.uri, rebuilt):
        sync(bench.root, uri)
        apply_records(bench.root, uri)
    assert bench.seen(rebuilt) == bench.seen(bench.uri)
    assert apply_records(bench.root, rebuilt) == 0
    assert bench.seen(rebuilt).aliases == {"champion": 3}


def test_promoting_the_champion_again_adds_nothing(bench: Bench) -> None:
    run = bench.with_adapter()
    bench.interview(run)
    first = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    assert promote(bench.root, run, "ep1", tracking_uri=bench.uri) == first
    assert sorted(bench.seen(bench.uri).versions) == [1]


def test_a_record_that_mlflow_missed_is_applied_later(bench: Bench) -> None:
    run = bench.with_adapter()
    bench.interview(run)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(StoreError, match="connection refused"):
        promote(bench.root, run, "ep1", tracking_uri=f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 10
    assert len(read_promotions(bench.root)) == 1
    assert apply_records(bench.root, bench.uri) == 1
    assert bench.seen(bench.uri).aliases == {"champion": 1}


def test_a_crash_between_model_and_version_leaves_one_of_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run = bench.with_adapter()
    bench.interview(run)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", _dying)
        with pytest.raises(StoreError, match="pulled the plug"):
            promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    assert apply_records(bench.root, bench.uri) == 1
    client = MlflowClient(bench.uri)
    experiment = client.get_experiment_by_name("tessera")
    assert experiment is not None
    assert len(client.search_logged_models([experiment.experiment_id])) == 1


def _dying(*_: object, **__: object) -> None:
    raise OSError("pulled the plug")


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [bench.with_adapter("one"), bench.with_adapter("two")]
    for run in runs:
        bench.interview(run)
    barrier = threading.Barrier(2)
    monkeypatch.setattr("tessera.promotion.registry.apply_records", lambda *_: 0)

    def together(*arguments: object) -> None:
        barrier.wait(timeout=30)
        write_promotion(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("tessera.promotion.registry.write_promotion", together)
    outcomes: list[object] = []

    def attempt(number: int) -> None:
        try:
            outcomes.append(promote(bench.root, runs[number], "ep1"))
        except ConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = read_promotions(bench.root)
    (error,) = [outcome for outcome in outcomes if isinstance(outcome, ConflictError)]
    assert winner in outcomes
    assert f"ada promoted {winner.who} to champion at the same moment" in str(error)


def test_a_store_that_lets_both_win_still_tells_the_loser(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    run = bench.with_adapter()
    bench.interview(run)
    mine = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    other = replace(mine, token="other", promoted_by="bob")
    monkeypatch.setattr(type(bench.root), "create_json", lambda *_: True)
    with pytest.raises(ConflictError, match="ada promoted"):
        write_promotion(bench.root, other)


def test_tampered_weights_are_noticed(bench: Bench) -> None:
    run = bench.with_adapter()
    bench.interview(run)
    path = run.path("adapters", "ep1", "adapter_model.safetensors")
    data = bytearray(bench.root.read_bytes(path))
    data[-1] ^= 1
    bench.root.publish(path, bytes(data))
    with pytest.raises(StoreError, match="it is damaged"):
        promote(bench.root, run, "ep1", tracking_uri=bench.uri)


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", "", "naïve"])
def test_an_alias_that_mlflow_reserves_or_refuses_is_bad_input(bench: Bench, alias: str) -> None:
    run = bench.finished()
    with pytest.raises(InputError, match="not usable as an alias"):
        promote(bench.root, run, "ep1", alias)


def test_words_that_cannot_be_meant_are_refused(bench: Bench) -> None:
    run = bench.with_adapter()
    with pytest.raises(InputError, match=r"has no adapter 'ep9'; it has: ep1\."):
        promote(bench.root, run, "ep9")
    with pytest.raises(InputError, match="reason of --override is empty"):
        promote(bench.root, run, "ep1", override=" ")
    bench.root.publish(run.path("interviews", "5" * 64, "ep1.json"), b"{}")
    with pytest.raises(InputError, match=r"interviews/5+/ep1\.json: "):
        promote(bench.root, run, "ep1")


@pytest.mark.parametrize("name", ["base.json", "weights.json"])
@pytest.mark.parametrize("value", [{}, [], {"weights_digest": None}])
def test_a_sidecar_of_another_form_is_damage(bench: Bench, name: str, value: object) -> None:
    from tessera.evaluation.weights import load_voice

    run = bench.with_adapter()
    bench.root.publish_json(run.path("adapters", "ep1", name), value)
    with pytest.raises(DamagedError, match=rf"adapters/ep1/{name} in .*weights_digest"):
        promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    with pytest.raises((DamagedError, InputError), match=rf"{name}"):
        load_voice(bench.root, run, "ep1")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weights.json", {}, "weights_digest"),
        ("weights.json", [], "weights_digest"),
        ("config.json", {}, "architecture"),
        ("config.json", [], "architecture"),
        ("config.json", {"architecture": "ProtoGPT"}, "layers"),
        ("config.json", {"colour": "blue"}, "colour"),
        ("config.json", {"layers": "many"}, "layers"),
        ("config.json", {"layers": 2}, "does not describe the tensors"),
        ("config.json", {"layers": 10**9}, "does not describe the tensors"),
        ("config.json", {"heads": 0}, "does not describe the tensors"),
        ("config.json", {"heads": 3}, "does not describe the tensors"),
        ("config.json", {"context": 99, "vocab_size": 301}, "does not describe the tensors"),
    ],
)
def test_a_base_of_another_form_is_damage(
    bench: Bench, name: str, value: dict[str, object], says: str
) -> None:
    from tessera.evaluation.weights import find_base, load_base, load_voice
    from tessera.runs import open_run

    voice = bench.with_adapter()
    assert voice.record.base is not None
    run = open_run(bench.root, voice.record.base["run_id"])
    path = run.path("model", name)
    if says not in ("weights_digest", "architecture") and "architecture" not in value:
        value = bench.root.read_json(path) | value
    bench.root.publish_json(path, value)
    for load in (lambda: load_base(run), lambda: load_voice(bench.root, voice, "ep1")):
        with pytest.raises(DamagedError) as error:
            load()
        text = str(error.value)
        assert path in text
        assert says in text
        assert "\n" not in text
    if name == "weights.json":
        with pytest.raises(DamagedError, match=r"model/weights\.json"):
            find_base(bench.root, "d" * 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"r": "x"}, "r: "), ({"r": 0}, "r: "), ({"target_modules": None}, "target_modules: ")],
)
def test_an_adapter_configuration_of_another_form_is_damage(
    bench: Bench, change: dict[str, object], says: str
) -> None:
    from tessera.evaluation.weights import load_voice

    run = bench.with_adapter()
    path = run.path("adapters", "ep1", "adapter_config.json")
    bench.root.publish_json(path, bench.root.read_json(path) | change)
    with pytest.raises(DamagedError, match=rf"adapter_config\.json of runs/.*ep1 in .*\({says}"):
        load_voice(bench.root, run, "ep1")


def test_the_base_is_looked_for_in_the_root_of_the_promotion_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    run = bench.with_adapter()
    bench.interview(run)
    promotion = promote(bench.root, run, "ep1", tracking_uri=bench.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.uri)
    monkeypatch.setenv("TESSERA_ROOT", str(bench.folder / "another"))
    assert mlflow.pyfunc.load_model(promotion.uri).predict(["walk"])
    Path(bench.root.url).rename(bench.folder / "moved")
    with pytest.raises(InputError, match=r"No base model in .*another has"):
        mlflow.pyfunc.load_model(promotion.uri)


def test_a_uid_without_a_name_promotes_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.delenv("USER")
    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr("os.getuid", lambda: 4711)
    monkeypatch.setattr("tessera.promotion.registry.apply_records", lambda *_: 0)
    run = bench.with_adapter()
    bench.interview(run)
    assert promote(bench.root, run, "ep1").promoted_by == "uid 4711"


@pytest.mark.parametrize("change", [{"number": None}, {"evidence": [{}]}, {"colour": "blue"}])
def test_a_promotion_of_another_form_is_damage(bench: Bench, change: dict[str, object]) -> None:
    from dataclasses import asdict

    from tessera.promotion.records import Promotion

    record = Promotion(
        1, "t", "champion", "r", "ep1", "b", "d", "d", (), None, (), None, None, "now", "ada"
    )
    bench.root.publish_json(record.path, asdict(record))
    assert read_promotions(bench.root) == [record]
    bench.root.publish_json(record.path, asdict(record) | change)
    with pytest.raises(DamagedError, match=r"000001\.json in .* is not a promotion record"):
        read_promotions(bench.root)


def test_an_alias_moved_by_hand_is_told_and_moved_back(bench: Bench) -> None:
    from mlflow import MlflowClient

    voice = bench.with_adapter()
    bench.interview(voice)
    promote(bench.root, voice, "ep1", tracking_uri=bench.uri)
    client = MlflowClient(bench.uri)
    told: list[str] = []
    apply_records(bench.root, bench.uri, told)
    assert told == []
    client.delete_registered_model_alias("tessera-adapter", "champion")
    client.set_registered_model_alias("tessera-adapter", "mine", "1")
    apply_records(bench.root, bench.uri, told)
    moved, foreign = told
    assert moved.startswith("Alias champion was moved away in MLflow")
    assert foreign.startswith("Alias mine (version 1) was given in MLflow")
    aliases = client.get_registered_model("tessera-adapter").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {
        "champion": "1",
        "mine": "1",
    }
