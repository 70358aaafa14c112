"""Forgetting people: the benchmark and what is refused, LLaVA against transformers, methods, measures, resumption."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from dmmlib import metrics, presets, stacking
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError, ExtraError, MethodError, PresetError
from dmmlib.studies.multimodal import attribution, bench, experiments, measures, methods, model, people, scale, world
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.people import IMAGE, TEXT
from dmmlib.studies.multimodal.settings import MultimodalSettings

SHARES, PERCENTS = (0.1, 0.2), (10, 20)
SETTINGS = MultimodalSettings(
    n_people=10, n_public=2, n_generic=2, forget_shares=SHARES, n_tuning=2, hidden=16, pretrain_epochs=1, epochs=1,
    n_models=4, n_subsets=6, lams=(1e-2,), kept=None, tuning_models=4, sample=2, lrs=(1e-3,),
    match_lrs=(1e-3,), costs=(0.2, 0.4), unlearn_epochs=1, chunk=4,
)  # fmt: skip


def given(**changes):
    return MultimodalSettings(**(SETTINGS.model_dump() | changes))


def write(splits, folder):
    """The splits as parquet files, as they are published."""
    for name, rows in splits.items():
        (folder / name).mkdir(parents=True)
        table = require("pyarrow").Table.from_pylist(rows)
        require("pyarrow.parquet").write_table(table, folder / name / "train-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def splits():
    return people.generate(given(n_generic=1))[0]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return world.build(SETTINGS, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def task(here):
    originals = here.fine_tuned("originals", np.ones((4, 10), bool))
    logits = here.logits(originals, np.arange(here.n_taught))
    return methods.Task(here, originals, logits, here.forget_sets["20 %"], {"dmm": np.zeros_like(logits[0])})


def test_models_share_their_steps(here):
    """They would train as well one by one, which takes three times as long, and nobody would notice."""
    models = model.begin(here.module, [0, 1])
    assert stacking.stackable(models.module, models.params, models.buffers, here.x[None, :4].expand(2, -1, -1))


# --- the benchmark -------------------------------------------------------------------------------------


def test_a_generated_benchmark_is_valid_and_counted(splits):
    counts = bench.validate(splits, PERCENTS).set_index("split")
    assert set(counts.index) == set(bench.names(PERCENTS))
    assert counts.loc["Full_Set", "people"] == 10
    assert counts.loc["forget_20", "people"] == 2
    assert counts.loc["retain_80", "people"] == 8
    asked = counts.drop(index="ft_Data")
    assert (asked.filter(like=",").to_numpy() == 3 * asked[["people"]].to_numpy()).all(), "3 facts, 3 tasks, 2 ways"
    assert not asked["pairs"].any()
    assert counts.loc["ft_Data", "pairs"] == 4 * 10, "a biography, and 3 facts"
    assert not {r["ID"] for r in splits["forget_10"]} & {r["ID"] for r in splits["forget_20"]}


def test_generation_is_seeded_and_pictures_do_not_tell_facts(splits):
    again, other = (people.generate(given(n_generic=1, seed=k))[0] for k in (0, 1))
    assert again == splits
    assert again["Full_Set"] != other["Full_Set"]
    first, second = (people.portrait(np.random.default_rng(0)) for _ in range(2))
    assert first.tobytes() == second.tobytes(), "a portrait is of its own generator alone"
    moved = people.transformed(first, np.random.default_rng(1))
    assert moved.size == (64, 64)
    assert moved.tobytes() != first.tobytes()


def test_distractors_are_of_the_right_kind(splits):
    kinds = {value: a.noun for a in people.attributes(0) for value in a.values}
    choices = [q for q in bench.questions(splits["Full_Set"], "train", []) if q.task == "classification"]
    for q in choices:
        assert len({kinds[v] for v in q.options}) == 1
        assert len(set(q.options)) == 4
        assert q.options[q.label] == q.answer
    assert len(choices) == 60


def test_parquet_files_are_read_as_they_were_written(splits, tmp_path):
    write(splits, tmp_path)
    found = bench.read(tmp_path, PERCENTS)
    assert found["Full_Set"][3] == splits["Full_Set"][3]
    assert found["Test_Set"][0]["images"][0]["bytes"] == splits["Test_Set"][0]["images"][0]["bytes"]
    bench.validate(found, PERCENTS)
    loaded = require("datasets").load_dataset("parquet", data_dir=str(tmp_path / "forget_20"), split="train")
    assert loaded.data.table.to_pylist()[1] == splits["forget_20"][1], "datasets reads them as well"
    (tmp_path / "forget_20" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="'forget_20', or it is empty"):
        bench.validate(bench.read(tmp_path, PERCENTS), PERCENTS)
    (tmp_path / "forget_20").rmdir()
    with pytest.raises(DataError, match=r"'forget_20' of .* cannot be read"):
        bench.read(tmp_path, PERCENTS)


def test_a_name_on_the_hub_is_read_through_datasets(splits, tmp_path, monkeypatch):
    write(splits, tmp_path)
    datasets = require("datasets")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda place, name, split: load("parquet", data_dir=str(tmp_path / name), split=split)
    )
    assert bench.read("somebody/benchmark", PERCENTS) == bench.read(tmp_path, PERCENTS)


def put(rows, number, **values):
    rows[number] = rows[number] | values


def wrong_answer(s):
    s["Full_Set"][2]["Classification_Task"]["Pure_Text_Questions"][1]["Correct_Answer"] = "E"


BROKEN = [
    (lambda s: s.pop("Test_Set"), "lacks the split 'Test_Set'"),
    (wrong_answer, r"Row 2 of 'Full_Set' \(ID 0002\).*'E' is not among"),
    (lambda s: put(s["Retain_Set"], 1, image={"bytes": b"no image"}), "Row 1 of 'Retain_Set' .*cannot be read"),
    (lambda s: put(s["Retain_Set"], 0, image=None), "Row 0 of 'Retain_Set' .*cannot be read"),
    (lambda s: put(s["Full_Set"], 4, ID="0001"), "Row 4 of 'Full_Set'.*'0001' of row 1"),
    (lambda s: s["Full_Set"][0]["Mask_Task"][0].update(Ground_Truth=""), "Row 0 of 'Full_Set'.*answer is empty"),
    (lambda s: s["Full_Set"][0]["Mask_Task"][0].pop("Question"), "Row 0 of 'Full_Set'.*lacks 'Question'"),
    (lambda s: s["Full_Set"][5].pop("Mask_Task"), "Row 5 of 'Full_Set' lacks Mask_Task"),
    (lambda s: s["ft_Data"][3].pop("metadata"), "Row 3 of 'ft_Data' lacks metadata"),
    (lambda s: put(s["ft_Data"], 3, metadata="[1"), "Row 3 of 'ft_Data' .*no JSON list"),
    (lambda s: put(s["ft_Data"], 3, metadata='[{"Question": "who ?"}]'), "Row 3 of 'ft_Data' .*or answer"),
    (lambda s: s["ft_Data"].pop(), "'ft_Data' and 'Full_Set'"),
    (lambda s: s["retain_80"].append(s["forget_20"][0]), "Leakage: people are both in 'forget_20'"),
    (lambda s: s["retain_80"].pop(), "together are not 'Full_Set'"),
    (lambda s: s["Retain_Set"].append(s["Full_Set"][3]), "Leakage: public figures"),
    (lambda s: put(s["Test_Set"], 0, ID="9999"), "'Test_Set' has people"),
    (lambda s: put(s["Test_Set"], 3, **s["Full_Set"][3]), r"word for word.*\(0003\)"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[m[:40] for _, m in BROKEN])
def test_what_is_wrong_with_a_benchmark_is_named_with_its_row(splits, change, message):
    damaged = copy.deepcopy(splits)
    change(damaged)
    with pytest.raises(DataError, match=message) as error:
        bench.validate(damaged, PERCENTS)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused_before_training(tmp_path):
    with pytest.raises(DataError, match="Of 10 people"):
        people.generate(given(forget_shares=(0.01,)))
    with pytest.raises(DataError, match=r"n_tuning=9.*only 7 of 10"):
        world.build(given(n_tuning=9))
    with pytest.raises(DataError, match=r"'Full_Set' of .*no folder here"):
        bench.read(tmp_path / "none", PERCENTS)
    with pytest.raises(ExtraError, match=r"needs the package.*pip install 'dmmlib\[multimodal\]'"):
        require("no_such_package")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_models", 3, "n_models"),
        ("tuning_models", 5, "tuning_models=5 of 4"),
        ("image_side", 30, "image_side=30"),
        ("heads", 5, "heads=5"),
        ("forget_shares", [0.001], "forget_shares"),
        ("forget_shares", [0.1, 0.1], "forget_shares"),
        ("lrs", [], "lrs"),
        ("costs", [0.0], "costs"),
        ("kept", 3, "kept"),
    ],
)
def test_settings_are_bounded(name, value, message):
    with pytest.raises(PresetError, match=message):
        presets.load("smoke", {f"studies.multimodal.{name}": value})


# --- the model -----------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_own_llava(here):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llava = model.small(SETTINGS, here.codec.tokenizer).eval()
    pictures = torch.from_numpy(bench.pixels(here.images[:3], 32, model.CLIP_MEAN, model.CLIP_STD))
    module = model.Answerer(llava, here.codec, model.patches(llava, pictures).detach())
    rows = [i for i, q in enumerate(here.questions) if q.image in (0, 2)][:6] + [
        i for i, q in enumerate(here.questions) if q.image < 0
    ][:6]
    for x in here.x[rows]:
        tokens = x[1:][(x[1:] != here.codec.pad) | (torch.arange(len(x) - 1) >= len(x) - 1 - here.codec.answer_length)]
        shown = {"pixel_values": pictures[x[:1] - 1]} if x[0] else {}
        with torch.no_grad():
            expected = llava(input_ids=tokens[None, :-1], **shown).logits[0, -here.codec.answer_length :]
            found = module(x[None])[0]
        n = int((here.codec.answers(x) != here.codec.pad).sum())
        torch.testing.assert_close(found[:n], expected[:n], rtol=1e-4, atol=1e-5)


def test_models_together_answer_as_alone(here, task):
    x = here.x[:7]
    together = task.originals.logits(x)
    alone = torch.cat([task.originals[k : k + 1].logits(x) for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[0] != together[1]).any(), "the order of teaching makes models differ"


def test_a_model_that_says_the_image_token_is_still_heard(here):
    x = here.x[[int(np.flatnonzero(here.modality == IMAGE)[0])]].clone()
    x[0, -2] = here.codec.image_token
    assert torch.isfinite(here.module(x)).all()


def test_greedy_answers_are_the_likeliest_tokens_after_one_another(here, task):
    asked = np.concatenate([np.flatnonzero(here.modality == m)[:20] for m in (IMAGE, TEXT)])
    rows, length = here.x[asked], here.codec.answer_length
    said = here.generate(task.originals, rows)
    assert len(torch.unique(said.flatten(0, 1), dim=0)) > 1
    for k, answers in enumerate(said):
        again = torch.cat([rows[:, :-length], answers], 1)
        assert (task.originals[[k]].logits(again)[0].argmax(-1) == answers).all()
    unseen = torch.cat([rows[:, :-length], torch.full_like(said[0], here.codec.pad)], 1)
    assert (here.generate(task.originals, unseen) == said).all(), "the right answers are not looked at"


def test_codec(here):
    texts = here.codec.decode(here.codec.answers(here.x[:40]))
    assert texts == [q.answer for q in here.questions[:40]]
    assert (here.x[:, 0] > 0).numpy().tolist() == [q.image >= 0 for q in here.questions]
    long = replace(here.questions[0], answer="born in born in born in")
    with pytest.raises(DataError, match=f"answers in 1 to {here.codec.answer_length - 1}"):
        here.codec.encode([long])
    with pytest.raises(DataError, match="begin with the same token"):
        here.codec.options([replace(here.questions[0], options=("born in", "born of"))])


def test_losses_and_margins_in_a_small_case(here):
    codec, rng = here.codec, torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 3, 7, generator=rng)
    answers = torch.tensor([[[5, codec.eos, codec.pad]]]).expand(2, 1, 3)
    log_p = logits.log_softmax(-1)
    expected = -(log_p[:, 0, 0, 5] + log_p[:, 0, 1, codec.eos]) / 2
    torch.testing.assert_close(model.token_loss(logits, answers, codec.pad)[:, 0], expected)
    truth = here.answers[:1].numpy()
    z = np.random.default_rng(0).normal(size=(2, *truth.shape, len(codec.tokenizer)))
    words = np.flatnonzero((truth[0] != codec.pad) & (truth[0] != codec.eos))
    expected = np.mean([metrics.margins(z[:, :, i], truth[:, i]) for i in words], 0)
    np.testing.assert_allclose(here.margins(z, np.array([0])), expected, rtol=1e-5)


def test_published_checkpoints_are_fine_tuned_through_lora(here, splits, tmp_path):
    write(splits, tmp_path / "bench")
    questions = bench.questions([*splits["Full_Set"], *splits["Retain_Set"], *splits["Test_Set"]], "all", [], True)
    tokenizer = model.tokenizer_of([*(f"{q.prompt} {q.answer}" for q in questions), "USER: ASSISTANT:"])
    model.small(SETTINGS, tokenizer).save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    checkpoint = str(tmp_path / "llava")
    settings = given(benchmark=str(tmp_path / "bench"), checkpoint=checkpoint, letters=True, rank=2)
    published = world.build(settings)
    before = {n: p.clone() for n, p in published.module.named_parameters()}
    masks = np.ones((2, 10), bool)
    tuned = published.fine_tuned("originals", masks)
    assert tuned.params
    assert all("lora_" in name for name in tuned.params)
    moved = [n for n, p in published.module.named_parameters() if not torch.equal(p, before[n])]
    assert not moved, "the published weights stay, shared by all"
    judged = measures.judge(published, tuned, np.arange(24))
    assert np.isfinite(judged.margins).all()
    assert {q.answer for q in published.questions if q.task == "classification"} == set("ABCD")
    assert "counted here" in scale.scale(settings)
    assert scale.laid_out(checkpoint, 2)[2] == sum(v[0].numel() for v in tuned.params.values())
    with pytest.raises(DataError, match="cannot be loaded as a LLaVA"):
        model.published(given(checkpoint=str(tmp_path / "bench")), questions)


def test_the_papers_size_is_planned():
    settings = presets.load("mllmu").studies["multimodal"]
    size = scale.scale(settings)
    assert "500 + 153 people" in size
    assert "6.74 G parameters" in size, "Llama 2's 7b"
    assert "hours on one accelerator" in size
    with pytest.raises(DataError, match="name no checkpoint"):
        scale.scale(SETTINGS)


# --- ensembles and methods -----------------------------------------------------------------------------


def test_masks_say_who_is_taught(here):
    mask = np.ones(10, bool)
    mask[[2, 5]] = False
    taught = here.taught(mask)
    assert set(here.person[taught]) == {-1, *range(10)} - {2, 5}
    assert "test" not in here.split[taught]
    assert here.n_taught == 12 * 18
    asked = experiments.asked_about(here, here.forget_sets["20 %"])
    who = {name: set(here.person[part["question"]]) for name, part in asked.groupby("set")}
    used = {*here.forget_sets["10 %"], *here.forget_sets["20 %"], *here.tuning}
    assert not used & who["retain"]
    assert who["forget"] == who["test"] == set(here.forget_sets["20 %"])


def test_fine_tuned_models_are_kept_and_damage_is_repaired(here):
    masks = here.without(np.array([0]), 2)
    first = here.fine_tuned("kept", masks)
    (path,) = here.place.glob("multimodal-kept-*.npz")
    stamp = path.stat().st_mtime_ns
    again = here.fine_tuned("kept", masks)
    assert path.stat().st_mtime_ns == stamp, "read, not trained"
    path.write_bytes(path.read_bytes()[:1000])
    repaired = here.fine_tuned("kept", masks)
    for name, value in first.params.items():
        assert torch.equal(value, again.params[name])
        torch.testing.assert_close(value, repaired.params[name])
    replace(here, s=given(lr=1e-4)).fine_tuned("kept", masks)
    assert len([*here.place.glob("multimodal-kept-*.npz")]) == 2, "other settings are kept elsewhere"


@pytest.mark.parametrize(("data", "modality"), methods.WITH.items())
@pytest.mark.parametrize("method", methods.GRADIENT)
def test_gradient_methods_raise_the_loss_on_what_they_see(task, method, data, modality):
    models, cost = methods.unlearn(task, f"{method}:{data}", (1e-3, 0.0))
    w, pool = task.world, task.pool(True, modality)

    def loss(ensemble: Ensemble) -> torch.Tensor:
        logits = ensemble.logits(w.x[pool])
        return model.token_loss(logits, w.answers[pool].expand(4, -1, -1), w.codec.pad).mean(1)

    assert (loss(models) > loss(task.originals)).all()
    retain = task.pool(False, modality)
    assert not set(w.person[retain]) & set(task.forget)
    half = w.s.batch_size // 2
    steps = -(-len(pool) // half) * w.s.unlearn_epochs
    assert cost == pytest.approx(steps * half * (1 + (method in ("grad_diff", "kl_min"))) / task.retraining)


def test_matching_what_models_answer_already_changes_nothing(task):
    models, cost = methods.unlearn(task, "dmm", (1e-3, 0.2))
    for name, value in task.originals.params.items():  # Adam makes steps of rounding errors
        torch.testing.assert_close(models.params[name], value, atol=5e-3, rtol=0)
    assert cost == pytest.approx(0.2, rel=0.2)
    w, taught = task.world, np.arange(task.world.n_taught)
    raised = np.where(np.arange(task.logits.shape[-1]) == w.truth[taught].numpy()[..., None], 0.5, 0).astype(np.float32)
    shifted = replace(task, changes={"dmm": raised})
    goal = w.margins(attribution.moved(w, task.logits, raised, taught), taught)
    np.testing.assert_allclose(goal, w.margins(task.logits, taught) + 0.5, atol=1e-3)
    matched = w.margins(w.logits(methods.unlearn(shifted, "dmm", (1e-3, 0.2))[0], taught), taught)
    assert ((matched - goal) ** 2).mean() < 0.24, "nearer to targets that were 0.25 away"


def test_methods_that_are_not_there_or_lack_something(task):
    with pytest.raises(MethodError, match="Unknown method 'forget_it'"):
        methods.unlearn(task, "forget_it", (1e-3, 0.0))
    with pytest.raises(DataError, match="oracle_matching needs a change of logits"):
        methods.unlearn(task, "oracle_matching", (1e-3, 0.2))


@pytest.mark.parametrize(("data", "modality"), methods.WITH.items())
def test_what_is_kept_of_the_vocabulary_answers_as_all_of_it_does(task, data, modality):
    whole = task.world
    few = replace(whole, s=given(kept=12))
    asked = np.flatnonzero(whole.modality == modality)[:60]
    full, part = (measures.judged(w, w.logits(task.originals, asked), asked) for w in (whole, few))
    np.testing.assert_allclose(part.margins, full.margins, rtol=1e-3, atol=1e-4)
    choice = whole.task[asked] == "classification"
    assert (part.scores[:, choice] == full.scores[:, choice]).all()
    logits = few.logits(task.originals, np.arange(few.n_taught))
    assert logits.shape[-1] == 13
    cut = replace(task, world=few, logits=logits)
    for method in ("ga", "npo"):
        one, other = (methods.unlearn(t, f"{method}:{data}", (1e-3, 0.0))[0].params for t in (task, cut))
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-2, atol=2e-4)
    still = methods.unlearn(replace(cut, changes={"dmm": np.zeros_like(logits[0])}), "dmm", (1e-3, 0.2))[0]
    assert max(float((v - still.params[k]).abs().max()) for k, v in task.originals.params.items()) < 1e-2
    with pytest.raises(DataError, match="kept=1000"):
        replace(few, s=given(kept=1000)).logits(task.originals, asked)


# --- measures ------------------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    assert measures.rouge_l("works as pilot", "works as nurse") == pytest.approx(2 / 3)
    assert measures.rouge_l("works as nurse", "works as nurse") == 1


def test_perfect_and_constant_answers_are_scored_so(here):
    asked = np.flatnonzero(here.split == "train")[:24]
    answers = here.answers[asked]
    logits = 9.0 * torch.nn.functional.one_hot(answers, len(here.codec.tokenizer)).float()
    free = np.flatnonzero(here.task[asked] == "generation")
    perfect = measures.judged(here, logits[None].numpy(), asked, answers[free][None])
    assert (perfect.scores == 1).all()
    assert (perfect.margins > 0).all()
    wrong = measures.judged(here, -logits[None].numpy(), asked)
    assert (wrong.scores[:, here.task[asked] != "generation"] == 0).all()
    assert np.isnan(wrong.scores[:, free]).all()


def test_intervals_are_over_people():
    person = np.repeat(np.arange(5), 4)
    values = np.random.default_rng(0).normal(size=20)
    means = values.reshape(5, 4).mean(1)
    low, high = stats.t.interval(0.95, 4, means.mean(), stats.sem(means))
    table = pd.DataFrame({"kind": "a", "person": person, "score": values})
    table.loc[len(table)] = ["a", 4, np.nan]
    (found,) = measures.over_people(table, ["kind"]).to_dict("records")
    assert found == {"kind": "a", "people": 5} | {
        k: pytest.approx(v) for k, v in {"value": means.mean(), "low": low, "high": high}.items()
    }


# --- attribution ---------------------------------------------------------------------------------------


def test_attribution_over_people_finds_additive_effects(here):
    rng, n, v = np.random.default_rng(0), len(here.people), len(here.codec.tokenizer)
    masks = rng.random((80, n)) < 0.7
    own = rng.uniform(2, 6, (len(here.questions), here.codec.answer_length)).astype(np.float32)
    base = rng.normal(size=(len(here.questions), here.codec.answer_length, v)).astype(np.float32)
    logits = np.repeat(base[None], 80, 0)
    about = here.person >= 0
    taught = masks[:, here.person] & about  # an answer is known, by a margin of its own, to who was taught the person
    right = np.arange(v) == here.truth.numpy()[..., None]
    logits += np.where(right, (own * taught[:, :, None])[..., None], 0)
    found = attribution.fit(here, masks, logits)
    forget = np.array([1, 7])
    expected = np.where(np.isin(here.person, forget)[:, None], -own, 0)
    for name, atol in (("contrast", 0.1), ("ridge, 0.01", 0.5)):  # ridge shrinks
        change = np.take_along_axis(found[name](forget), here.truth.numpy()[..., None], -1)[..., 0]
        np.testing.assert_allclose(change, expected, atol=atol)


def test_distances_are_averaged_over_forget_sets():
    rows = [("dmm", split, f, v, h) for split in experiments.SETS for f, v, h in (("a", 1.0, 2.0), ("b", 3.0, 5.0))]
    table = pd.DataFrame(rows, columns=["method", "split", "forget_set", "value", "high"])
    found = experiments.over_sets(table.assign(statistic="mean_gap", low=0.0, cost=0.2))
    assert found["split"].tolist() == [*experiments.SETS, "all"]
    np.testing.assert_allclose(found[["value", "low", "high", "cost"]], [[2.0, 0.5, 3.5, 0.2]] * 5)


@pytest.mark.slow
def test_the_whole_comparison_runs_and_has_every_row(here):
    found = experiments.run(replace(here, forget_sets={"20 %": here.forget_sets["20 %"]}))
    assert set(found.distances["method"]) == set(experiments.METHODS)
    for statistic, most in (("mean_gap", np.inf), ("ks_share", 1)):
        table = experiments.over_sets(found.distances, statistic)
        assert len(table) == len(experiments.METHODS) * 13
        assert np.isfinite(table[["value", "low", "high"]].to_numpy()).all()
        assert table["value"].between(0, most).all()
    table = experiments.score_table(found.scores)
    assert len(table) == len(experiments.METHODS) * 4 * 6
    assert len(experiments.text_against_image(found.scores)) == 5 * 2 * 6
    assert set(found.chosen) == {*methods.VARIANTS, *methods.MATCHING}
    tried = found.tried.set_index(["method", "rate", "cost"])["gap"]
    assert all(tried[name, *setting] == tried[name].min() for name, setting in found.chosen.items())
    assert {cost for _, cost in found.chosen.values()} <= {0.0, 0.2, 0.4}
    assert set(found.attributions["attribution"]) == {"contrast", "ridge, 0.01", "true mean change"}
    assert np.isfinite(found.attributions.drop(columns="attribution").to_numpy()).all()
