"""``clipscale eval`` and ``clipscale results``: against open_clip and CLIP_benchmark's formulas, on ranks, as files."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from sklearn import metrics
from torchvision.io import ImageReadMode, decode_jpeg

from clipscale.apps.asking import ask
from clipscale.apps.evaluation.results import AGGREGATE, Results, compare, read_results, summarise, write_results
from clipscale.apps.evaluation.run import evaluate_tasks, show_results
from clipscale.apps.evaluation.tasks import Answer, Task, read_suite, run_task, shipped_suites
from clipscale.cli import app
from clipscale.errors import ClipscaleError, ConfigError, DataError
from clipscale.evals import EvalContext
from clipscale.evals.asked import Asked
from clipscale.evals.outcomes import Classified, Labelled, digest
from clipscale.evals.prompts import template_sets, templates
from tests import asked
from tests.peers import small
from tests.pool import Pool
from tests.shards import jpeg, write_shard

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def peer() -> Any:
    return small("tiny_quickgelu")[1]


@pytest.fixture(scope="module")
def model(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(asked.open_clip_directory(tmp_path_factory.mktemp("model") / "peer", peer, mean=MEAN, std=STD))


@pytest.fixture(scope="module")
def context(model: str) -> EvalContext:
    return ask(model, "cpu", 16)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def tasks(sets: Path) -> list[Task]:
    return [
        Task(f"{sets}/benchmark", "classes", "zeroshot", group_key="npy:0"),
        Task(f"{sets}/pairs.tar", "pairs"),
        Task(f"{sets}/labels.csv", "labels", labels=asked.LABELS),
        Task(f"{sets}/videos", "videos", clips=True),
    ]


@torch.no_grad()
def of_open_clip(peer: Any, count: int = asked.COUNT) -> tuple[torch.Tensor, Any]:
    """Features of the images by open_clip, and what gives those of texts."""
    pixels = torch.stack([decode(jpeg(n, asked.SIDE)) for n in range(count)]).float() / 255
    normed = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=32)

    def text(captions: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return peer.encode_text(tokenizer(captions), normalize=True)

    return peer.encode_image(normed, normalize=True), text


def decode(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def ensemble(text: Any, names: list[str], templates: list[str]) -> torch.Tensor:
    """CLIP_benchmark's classifier: of each class the mean of the prompts' unit vectors, made a unit vector again."""
    means = [text([template.replace("{}", name) for template in templates]).mean(0) for name in names]
    return torch.stack([one / one.norm() for one in means])


def test_zero_shot_is_clip_benchmarks(peer: Any, context: EvalContext, tasks: list[Task]) -> None:
    outcome = run_task(tasks[0], context).outcome
    found = outcome.scores(outcome.all)
    image, text = of_open_clip(peer)
    logits = 100 * image @ ensemble(text, asked.names(), ["a photo of a {}.", "art of the {}."]).T
    labels = torch.tensor([asked.label(n) for n in range(asked.COUNT)])
    answers = logits.argmax(1)
    top5 = logits.topk(5).indices
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found["top5"] == pytest.approx((top5 == labels[:, None]).any(1).double().mean().item())
    assert found["mean_per_class_recall"] == pytest.approx(metrics.balanced_accuracy_score(labels, answers))
    groups = [(answers == labels)[group::3].double().mean().item() for group in range(3)]
    assert found["worst_group_top1"] == pytest.approx(min(groups))
    sure = (image @ ensemble(text, asked.names(), ["a photo of a {}.", "art of the {}."]).T).double()
    confidence = (peer.logit_scale.exp().item() * sure).softmax(1).amax(1).numpy()
    np.testing.assert_allclose(outcome.arrays["confidence"], confidence, atol=1e-5)


def test_retrieval_is_clip_benchmarks(peer: Any, context: EvalContext, tasks: list[Task]) -> None:
    """Recall is whether any right one is among the first k, over every caption of every image."""
    outcome = run_task(tasks[1], context).outcome
    found = outcome.scores(outcome.all)
    image, text = of_open_clip(peer)
    captions = [caption for n in range(asked.COUNT) for caption in asked.captions(n)]
    of_image = torch.tensor([n for n in range(asked.COUNT) for _ in asked.captions(n)])
    scores = text(captions) @ image.T
    right = torch.nn.functional.one_hot(of_image, asked.COUNT).bool()
    for k in (1, 5, 10):
        of_texts = right.gather(1, scores.topk(k, dim=1).indices).any(1)
        of_images = right.T.gather(1, scores.T.topk(k, dim=1).indices).any(1)
        assert found[f"t2i_r{k}"] == pytest.approx(of_texts.double().mean().item())
        assert found[f"i2t_r{k}"] == pytest.approx(of_images.double().mean().item())
    assert len(captions) == len(set(captions)) == outcome.sizes["texts"]


def test_rows_of_one_image_are_one(context: EvalContext, sets: Path) -> None:
    rows = [f"{n}.jpg,{caption}" for n in range(20) for caption in asked.captions(n)]
    (sets / "captions.csv").write_text("\n".join(["filepath,caption", *rows]))
    outcome = run_task(Task(f"{sets}/captions.csv"), context).outcome
    assert outcome.sizes == {"images": 20, "texts": len(rows)}


def test_names_of_a_table_are_those_of_a_file_in_any_order(context: EvalContext, sets: Path, tmp_path: Path) -> None:
    rows = [f"{sets}/{n}.jpg,{asked.names()[asked.label(n)]}" for n in range(asked.COUNT)]
    (tmp_path / "set.csv").write_text("\n".join(["image,label", *rows]))
    (tmp_path / "classes.txt").write_text("\n".join(reversed(["something else", *asked.names()])))
    outcome = run_task(Task(f"{tmp_path}/set.csv", classes=f"{tmp_path}/classes.txt"), context).outcome
    found = [outcome.names[label] for label in outcome.arrays["label"]]
    assert (
        found == [asked.names()[asked.label(n)] for n in range(asked.COUNT)] and len(outcome.names) == asked.CLASSES + 1
    )


def test_labels_are_scikit_learns(peer: Any, context: EvalContext, tasks: list[Task], tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_text("a photo without {}\n")
    task = Task(tasks[2].path, "labels", labels=asked.LABELS, templates="name", negatives=str(tmp_path / "no.txt"))
    outcome = run_task(task, context).outcome
    found = outcome.scores(outcome.all)
    image, text = of_open_clip(peer)
    scores = image @ (text(list(asked.LABELS)) - text([f"a photo without {name}" for name in asked.LABELS])).T
    truth = np.array([asked.marks(n) for n in range(asked.COUNT)])
    for place, name in enumerate(asked.LABELS):
        known = ~np.isnan(truth[:, place])
        assert known.all() == (place < 2)
        one, other = truth[known, place], scores[known, place].numpy()
        assert found[f"auroc/{name}"] == pytest.approx(metrics.roc_auc_score(one, other))
        assert found[f"ap/{name}"] == pytest.approx(metrics.average_precision_score(one, other))


def test_labels_are_those_asked_for_beside_a_column_of_classes(context: EvalContext, sets: Path) -> None:
    """A table may have both; the column of classes has as many names as there are labels, which are not theirs."""
    rows = (sets / "labels.csv").read_text().splitlines()
    classed = [f"{row},{asked.WORDS[n % 3]}" for n, row in enumerate(rows[1:])]
    (sets / "both.csv").write_text("\n".join([f"{rows[0]},class", *classed]))
    found = run_task(Task(f"{sets}/both.csv", labels=asked.LABELS), context).outcome
    alone = run_task(Task(f"{sets}/labels.csv", labels=asked.LABELS), context).outcome
    assert found.names == asked.LABELS
    np.testing.assert_array_equal(found.arrays["score"], alone.arrays["score"])


def test_listed_labels(model: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("red\nold\n")
    rows = ["image,tags", "0.jpg,red|old", "1.jpg,Red", "2.jpg,", "3.jpg,old | 7", "gone.jpg,red"]
    (sets / "tags.csv").write_text("\n".join(rows))
    task = Task(f"{sets}/tags.csv", kind="multilabel", label_key="tags", classes=f"{tmp_path}/classes.txt")
    evaluate_tasks(model, [task], device="cpu", resamples=2, out=tmp_path / "out")
    label = read_results(tmp_path / "out").outcomes["tags.csv"].arrays["label"]
    assert label.tolist() == [[1, 1], [0, 0], [0, 0], [0, 1]]
    assert capsys.readouterr().err.splitlines() == [
        "warning: tags.csv: samples that could not be used: missing_image (1)",
        "warning: tags.csv: labels of the data that are none of the classes do not count: Red (1), 7 (1)",
    ]
    with pytest.raises(ConfigError, match="does not name its classes"):
        run_task(Task(f"{sets}/tags.csv", kind="multilabel", label_key="tags"), ask(model, "cpu"))


def test_numbers_of_an_array_are_yes_no_or_unknown(context: EvalContext, tmp_path: Path) -> None:
    split = tmp_path / "set" / "test"
    split.mkdir(parents=True)
    samples = []
    for number, row in enumerate([[1, 0], [-1, 1], [0, np.nan], [2, 0]]):
        stored = io.BytesIO()
        np.save(stored, np.array(row))
        samples.append((f"{number}", {"jpg": jpeg(number, asked.SIDE), "npy": stored.getvalue()}))
    write_shard(split / "0.tar", samples)
    (split / "nshards.txt").write_text("1")
    (tmp_path / "set" / "classnames.txt").write_text("red\nold\n")
    answer = run_task(Task(f"{tmp_path}/set"), context)
    np.testing.assert_array_equal(answer.outcome.arrays["label"], [[1, 0], [np.nan, 1], [0, np.nan]])
    assert answer.asked.bad == {"label_is_no_yes_or_no": 1}


def test_frames_of_a_clip_are_averaged(peer: Any, context: EvalContext, tasks: list[Task]) -> None:
    outcome = run_task(tasks[3], context).outcome
    image, text = of_open_clip(peer, 24)
    clips = {(n % 2, n // 4): [m for m in range(24) if (m % 2, m // 4) == (n % 2, n // 4)] for n in range(24)}
    names = sorted(asked.names()[:2])
    classes = ensemble(text, names, ["a photo of a {}."])
    order = sorted(clips, key=lambda clip: (asked.names()[clip[0]], clip[1]))
    means = torch.stack([image[clips[clip]].mean(0) for clip in order])
    answers = (means @ classes.T).argmax(1)  # of a length that does not change the order
    assert outcome.sizes == {"samples": 12} and outcome.names == tuple(names)
    assert outcome.arrays["answer"].tolist() == answers.tolist()
    assert outcome.arrays["label"].tolist() == [names.index(asked.names()[clip[0]]) for clip in order]


def found_of(model: str, tasks: list[Task]) -> list[dict[str, np.ndarray]]:
    context = ask(model, "cpu", 5)
    return [dict(run_task(task, context).outcome.arrays) for task in tasks]


def test_two_ranks_find_what_one_does(pool2: Pool, model: str, tasks: list[Task]) -> None:
    """Every number that every score is made of, bit by bit, on both ranks."""
    alone = found_of(model, tasks)
    for ranks in pool2.run(found_of, model, tasks):
        for one, other in zip(alone, ranks, strict=True):
            assert one.keys() == other.keys()
            for name, array in one.items():
                np.testing.assert_array_equal(array, other[name], strict=True)


def test_results_are_stored_and_compared(
    model: str, tasks: list[Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = evaluate_tasks(model, tasks, device="cpu", resamples=40, out=tmp_path / "one")
    table = capsys.readouterr().out
    assert "classes" in table and "mean" in table
    stored = read_results(tmp_path / "one")
    assert stored.content == json.loads(json.dumps(content)) and set(stored.outcomes) == {t.name for t in tasks}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "results.json", "outcomes.npz", "confusion_classes.png", "confusion_videos.png",
    }  # fmt: skip
    mains = [one["scores"][one["metric"]] for one in content["tasks"]]
    assert content[AGGREGATE]["score"] == pytest.approx(sum(mains) / 4)
    low, high = content["tasks"][0]["intervals"]["top1"]
    assert low <= content["tasks"][0]["scores"]["top1"] <= high
    other = [Task(task.path, task.name, task.kind, templates="textures", labels=task.labels, clips=task.clips)
             for task in tasks[:3]]  # fmt: skip
    evaluate_tasks(model, other, device="cpu", resamples=40, out=tmp_path / "two", as_json=True)
    assert json.loads(capsys.readouterr().out)["tasks"][0]["name"] == "classes"
    same = compare(stored, stored, 10)
    assert all(one.change == one.low == one.high == 0 and not one.is_clear for one in same)
    found = {one.task: one for one in compare(stored, read_results(tmp_path / "two"), 50)}
    assert set(found) == {"classes", "pairs", "labels", AGGREGATE} and found["pairs"].change == 0
    assert found["classes"].low <= found["classes"].change <= found["classes"].high
    show_results([tmp_path / "one", tmp_path / "two"], None, tmp_path / "both.png", 10, False)
    shown = capsys.readouterr()
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG" and "labels" in shown.out and not shown.err
    show_results([], (tmp_path / "one", tmp_path / "two"), None, 10, False)
    assert "B: two" in capsys.readouterr().out


def test_other_queries_are_not_compared(
    model: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pairs.tar", "benchmark"):
        task = Task(f"{sets}/{name}", "same", "zeroshot" if name == "benchmark" else "retrieval")
        evaluate_tasks(model, [task], device="cpu", resamples=5, out=tmp_path / name)
    with pytest.raises(ConfigError, match="not asked the same queries"):
        show_results([], (tmp_path / "pairs.tar", tmp_path / "benchmark"), None, 5, False)
    show_results([tmp_path / "pairs.tar", tmp_path / "benchmark"], None, None, 5, True)
    assert "warning: same of benchmark: other queries than pairs.tar was asked" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no results"):
        read_results(sets)


def results(name: str, label: list[float], score: float, keys: str = "k", metric: str = "map") -> Results:
    """Two data sets of yes-or-no questions; of ``b`` no one is known."""
    found = {
        "a": Labelled({"score": np.array([[score], [0.5], [0.1]]), "label": np.array(label)[:, None]}, ("x",), keys),
        "b": Labelled({"score": np.zeros((3, 1)), "label": np.full((3, 1), np.nan)}, ("x",), "k"),
    }
    return Results(name, {"tasks": [{"name": one, "metric": metric, "kind": "multilabel"} for one in found]}, found)


def test_only_what_was_asked_the_same_is_compared() -> None:
    """The same keys with other labels are other data; a data set without a score is in no mean."""
    one, other = results("one", [1, 0, float("nan")], 0.0), results("two", [1, 0, float("nan")], 0.9)
    found = {difference.task: difference for difference in compare(one, other, 20)}
    assert found["a"].change == found[AGGREGATE].change == 0.5 and found[AGGREGATE].second == 1
    assert json.loads(json.dumps(found["b"].plain, allow_nan=False))["change"] is None
    for wrong in (results("w", [0, 1, float("nan")], 0.9), results("w", [1, 0, float("nan")], 0.9, "l")):
        with pytest.raises(ConfigError, match="not asked the same queries"):
            compare(one, wrong, 5)
    with pytest.raises(ConfigError, match="two has no ap/y; it has map, auroc, ap/x"):
        compare(results("one", [1, 0, float("nan")], 0.0, metric="ap/y"), other, 5)


def test_a_few_that_all_agree_are_not_sure() -> None:
    """Three of three are better, and six are a sign: as by the sign test, of p 0.25 and 0.03."""
    for count, clear in ((1, False), (3, False), (5, False), (6, True)):
        none, label = np.zeros(count), np.zeros(count, int)
        runs = [
            {"label": label, "answer": label, "top1": top1, "top5": none, "confidence": none}
            for top1 in (none, none + 1)
        ]
        task = {"tasks": [{"name": "a", "metric": "top1", "kind": "zeroshot"}]}
        first, second = (Results("run", task, {"a": Classified(found, ("x",) * 9, "")}) for found in runs)
        (one,) = compare(first, second, 20)
        assert one.change == one.high == 1 and one.is_clear == clear and (one.low > 0) == clear


def test_the_mean_says_of_how_many(tmp_path: Path) -> None:
    stored = results("one", [1, 0, float("nan")], 0.9).outcomes
    answers = [Answer(Task(name, kind="multilabel"), Asked(outcome, Counter())) for name, outcome in stored.items()]
    content = summarise("m", answers, 10)
    assert content[AGGREGATE]["score"] == 1 and content[AGGREGATE]["tasks"] == 1
    write_results(tmp_path, content, answers)
    assert read_results(tmp_path).outcomes.keys() == {"a", "b"}
    stored_bytes = (tmp_path / "outcomes.npz").read_bytes()
    for cut in (0, len(stored_bytes) // 2):
        (tmp_path / "outcomes.npz").write_bytes(stored_bytes[:cut])
        with pytest.raises(ConfigError, match="holds no results of clipscale eval"):
            read_results(tmp_path)


def test_the_command(model: str, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["eval", model, f"{sets}/pairs.tar", "--device", "cpu", "--resamples", "5", "--json"], standalone_mode=False)
    (one,) = json.loads(capsys.readouterr().out)["tasks"]
    assert one["kind"] == "retrieval" and one["metric"] == "mean_r1" and one["queries"]["images"] == asked.COUNT
    with pytest.raises(ClipscaleError, match="changes what a run was validated on"):
        app(["eval", model, f"{sets}/pairs.tar", "data.val.shards=x"], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "here"], "--out needs a data set, and none is named"),
        (["--label-key", "x"], "--label-key needs a data set, and none is named"),
        (
            ["--suite", "datacomp", "--data-dir", "gone", "--templates", "pets"],
            "--templates is a key of a suite's tasks",
        ),
        (["--suite", "datacomp", "--data-dir", "gone"], "1k_test does not exist; of 38 data sets 38 do not"),
        (["{sets}/pairs.tar", "--out", "{sets}/0.jpg/results"], "0.jpg is no directory that may be written into"),
    ],
)
def test_what_would_be_lost_is_said_before_a_model_is_asked(
    options: list[str], message: str, model: str, sets: Path
) -> None:
    with pytest.raises(ClipscaleError, match=message):
        app(["eval", model, *(one.replace("{sets}", str(sets)) for one in options)], standalone_mode=False)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (Task("nowhere"), DataError, "^nowhere does not exist"),
        (Task("{sets}/pairs.tar", kind="guess"), ConfigError, "kind guess: choose from zeroshot"),
        (Task("{sets}/pairs.tar", metric="top1"), ConfigError, "metric top1 is none of i2t_r1"),
        (Task("{sets}/pairs.tar", kind="zeroshot"), ConfigError, "does not name its classes; --classes FILE"),
        (Task("{sets}/benchmark", kind="zeroshot", classes="two.txt"), DataError, "from 0 to 4, and there are 2 class"),
        (Task("{sets}/benchmark", kind="zeroshot", classes="gone.txt"), DataError, "--classes gone.txt: No such file"),
        (Task("{sets}/benchmark", kind="zeroshot", templates="ten"), ConfigError, "no set: choose from simple"),
        (Task("{sets}/benchmark", kind="zeroshot", templates="two.txt"), DataError, "needs one {}"),
        (Task("{sets}/benchmark", kind="retrieval"), DataError, "no_caption"),
        (Task("{sets}/benchmark", kind="zeroshot", group_key="npy:2"), DataError, "no_npy:2"),
        (Task("{sets}/benchmark", kind="zeroshot", group_key="npy:x"), ConfigError, "takes the number of a column"),
        (Task("{sets}/pairs.tar", clips=True), ConfigError, "--clips is for folders of frames"),
        (Task("{sets}/labels.csv", labels=("red", "odd")), DataError, "no_odd"),
        (Task("{sets}/labels.csv", labels=("red",), classes="two.txt"), ConfigError, "has 2 names for 1 --labels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    task: Task, error: type[ClipscaleError], message: str, context: EvalContext, sets: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    fields = vars(task) | {"path": task.path.replace("{sets}", str(sets))}
    with pytest.raises(error, match=message) as caught:
        run_task(Task(**fields), context)
    assert "\n" not in str(caught.value)


def test_suites(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "tasks:\n- {path: a, name: A, labels: [x, 1], templates: own.txt}\n"
        "- {path: 's3://b/c', metric: top5, clips: yes}\n"
    )
    (tmp_path / "own.txt").write_text("{}\n")
    one, other = read_suite(str(tmp_path / "own.yaml"), None)
    assert one == Task(f"{tmp_path}/a", "A", labels=("x", "1"), templates=f"{tmp_path}/own.txt")
    assert other == Task("s3://b/c", metric="top5", clips=True) and other.shown == "c"
    assert read_suite(str(tmp_path / "own.yaml"), "/d")[0].path == "/d/a"
    (tmp_path / "lax.yaml").write_text(
        "tasks: [{path: '0.tar::/d/1.tar', labels: 'x, y', kind: }, {path: a, labels: }]"
    )
    one, other = read_suite(str(tmp_path / "lax.yaml"), None)
    assert one == Task(f"{tmp_path}/0.tar::/d/1.tar", labels=("x", "y")) and other == Task(f"{tmp_path}/a")
    for text, message in {
        "tasks: 3": "needs a list tasks", "tasks: []": "needs a list tasks", "- 1": "needs a list tasks",
        "tasks: [{path: a, nam: b}]": "no key 'nam'", "tasks: [{": "while parsing",
    }.items():  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_suite(str(tmp_path / "bad.yaml"), None)
    with pytest.raises(ConfigError, match="is no file, and none of datacomp"):
        read_suite("nothing", None)
    with pytest.raises(ConfigError, match="needs --data-dir"):
        read_suite("datacomp", None)
    listed = read_suite("datacomp", "/d")
    assert len(listed) == len({task.shown for task in listed}) == 38 and set(shipped_suites()) == {"datacomp"}


def test_the_page_runs(
    model: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of docs/evaluating.md but that of torchrun, on small sets of these names, and its Python."""
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()
    (tmp_path / "runs").mkdir()
    links = {
        "runs/mine": model, "runs/other": model, "pairs.tar": sets / "pairs.tar", "videos": sets / "videos",
        "val.tar": sets / "benchmark/test/1.tar", "findings.csv": sets / "labels.csv", "photos": sets / "photos",
    }  # fmt: skip
    asked.write_folder(sets / "photos")
    for name, place in links.items():
        (tmp_path / name).symlink_to(place)
    for number in range(asked.COUNT):
        (tmp_path / f"{number}.jpg").symlink_to(sets / f"{number}.jpg")
    (tmp_path / "classes.txt").write_text("\n".join(asked.names()))
    (tmp_path / "without.txt").write_text("a photo without {}\n")
    (suite,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "suite.yaml").write_text(suite)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        if line.startswith("clipscale "):
            speed = ["--resamples", "5", *(["--device", "cpu"] if " eval " in line else [])]
            app([*shlex.split(line)[1:], *speed], standalone_mode=False)
    assert (tmp_path / "results/both.png").is_file() and len(lines) == 10
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.splitlines()[-1].count(" ") == 2


def test_names_of_files_that_are_no_text_have_a_digest() -> None:
    assert digest(["caf\udce9.jpg"]) != digest(["caf.jpg"])


def test_prompts_are_those_of_the_paper(tmp_path: Path) -> None:
    theirs = {template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    assert len(template_sets()["imagenet"]) == 80 and set(template_sets()["imagenet"]) == theirs
    assert all(template.count("{}") == 1 for one in template_sets().values() for template in one)
    (tmp_path / "mine.json").write_text('{"templates": ["the {c}", "a {}"]}')
    assert templates(str(tmp_path / "mine.json")) == ["the {}", "a {}"]
