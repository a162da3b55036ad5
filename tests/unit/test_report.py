"""What is told of runs: the page is whole, runs nothing and fetches nothing, whatever stands in a run's files."""

from __future__ import annotations

import fcntl
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from clipscale.apps.record import Record, differing, find_records, read_record
from clipscale.apps.report import write_report
from clipscale.apps.report.charts import wait_share
from clipscale.apps.report.curves import MOST, Curve, draw, thinned, ticks
from clipscale.apps.report.findings import findings
from clipscale.cli import app
from clipscale.config import compose, save_config
from clipscale.config.rundir import lock, write_result
from clipscale.data.evalset import EvalItem
from clipscale.errors import ClipscaleError, ConfigError, ExitCode
from clipscale.evals.examples import Answers, Examples, Pairs

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\" '\ud800"


def make_run(path: Path, *overrides: str, steps: int = 20, ended: int | None = 0) -> Path:
    """A run's directory as training leaves it; ``ended`` is its exit code, None for one that was killed."""
    (path / "logs").mkdir(parents=True)
    config, _ = compose([f"name={path.name}", "total_samples=2000", *overrides])
    save_config(config, path / "config.yaml")
    (path / "overrides.txt").write_text("\n".join(overrides))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "gpus": [], "packages": {"torch": "2.15"}}))
    started = {"time": "2026-01-02T03:04:05Z", "event": "started", "attempt": 1, "world_size": 2, "samples_seen": 0}
    (path / "events.jsonl").write_text(json.dumps(started) + "\n")
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(1, steps + 1):
            row: dict[str, Any] = {"samples_seen": 100 * i, "step": i, "time_s": 2.0 * i, "train/loss": 5 / i}
            row |= {"train/samples_per_s": 50.0, "train/bad_samples": 0.0, "time/data_wait_s": 0.5 * i}
            row |= {"time/goodput": 0.5, "time/wall_s": 4.0 * i, "time/step_s": 2.0 * i, "time/lost_s": 1.5 * i}
            if i % 10 == 0:
                row |= {"val/loss": 4.0, "val/retrieval/i2t_r1": 0.5, "val/retrieval/i2t_r1_chance": 0.1}
            file.write(json.dumps(row) + "\n")
    if ended is not None:
        write_result(path, "done" if ended == 0 else "failed", ended)
    return path


class _Page(HTMLParser):
    """What a browser would do with a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset") and value and not value.startswith(("#", "data:image/")):
                self.fetched.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def look(path: Path) -> _Page:
    page = _Page(path.read_text(encoding="utf-8"))
    assert not page.open and not page.fetched and "script" not in page.tags
    for drawing in re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8")):
        ElementTree.fromstring(drawing)
    return page


def test_a_page_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", "optim.lr=1e-4")
    (run / "examples.json").write_text(json.dumps({
        "samples_seen": 2000,
        "retrieval": [{"caption": "a dog", "found": [{"image": PIXEL, "score": 0.5, "right": True, "caption": "dog"}]}],
        "similarity": {"captions": ["a", "b"], "values": [[1.0, 0.0], [0.0, 1.0]]},
        "confusion": {"classes": ["a", "b"], "counts": [[3, 1], [0, 4]]},
    }))  # fmt: skip
    assert write_report([run]) == run / "report.html"
    page, text = look(run / "report.html"), (run / "report.html").read_text()
    assert page.tags.count("img") == 1 and page.tags.count("svg") >= 5
    for told in ("mine", "done", "a dog", "optim.lr=1e-4", "Zero-shot confusion", "5.0×", "samples/s", "goodput"):
        assert told in text, told


def test_a_page_of_several(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / name, f"seed={seed}") for name, seed in (("one", 1), ("two", 2))]
    out = write_report([tmp_path / "runs"], tmp_path / "both.html")
    look(out)
    text = out.read_text()
    assert '<td class="name">seed</td><td>1</td><td>2</td>' in text or "seed</td><td>2</td><td>1</td>" in text
    assert not list((tmp_path / "runs").rglob("report.html"))
    with pytest.raises(ConfigError, match="name fewer"):
        write_report(runs * 5)


def test_whatever_stands_in_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "odd")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"samples_seen": 2100, "train/loss": null, "train/grad_norm": "x", "val/loss": NaN}\n[]\n{"samples')
    rows = [
        {"time": "2026-01-02T03:04:05Z", "event": HOSTILE, "detail": HOSTILE, "samples_seen": "many"},
        {"time": "2026-01-02T03:04:06Z", "event": "damaged_shard", "shard": HOSTILE, "damage": HOSTILE},
    ]
    with (run / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + "{}\nnull\n")
    (run / "overrides.txt").write_text("data.root=https://someone:hunter2@host/x?sig=hunter2\n")
    found = [{"image": f"https://host/{HOSTILE}", "score": 1.0}, {"image": PIXEL, "score": 1.0, "caption": HOSTILE}]
    (run / "examples.json").write_text(json.dumps({"retrieval": [{"caption": HOSTILE, "found": found}]}))
    look(write_report([run]))
    assert "hunter2" not in (run / "report.html").read_text()
    for name in ("metrics.jsonl", "events.jsonl", "examples.json", "environment.json", "overrides.txt", "result.json"):
        (run / name).unlink()
    (run / "config.yaml").write_text("[")
    look(write_report([run]))


def test_what_stands_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bad", ended=None)
    with (run / "metrics.jsonl").open("a") as file:
        row = {"samples_seen": 2000, "train/bad_samples": 100.0, "train/skipped_steps": 3.0, "time/data_wait_s": 40.0}
        file.write(json.dumps(row | {"time/restarts": 2.0, "train/truncated_captions": 900.0}) + "\n")
    told = "\n".join(findings(read_record(run)))
    for what in ("killed", "3 steps", "100 samples", "45.0% of captions", "waiting for data", "lost to restarts"):
        assert what in told, what
    assert findings(Record(tmp_path / "nothing")) == []


def test_states(tmp_path: Path) -> None:
    for code, state in ((0, "done"), (75, "preempted"), (3, "diverged"), (4, "data budget exceeded"), (1, "failed")):
        assert read_record(make_run(tmp_path / f"ended-{code}", ended=code)).state == state
    killed = make_run(tmp_path / "killed", ended=None)
    assert read_record(killed).state == "stopped"
    held = lock(killed)
    assert read_record(killed).state == "running"
    held.close()
    (killed / "events.jsonl").unlink()
    assert read_record(killed).state == "new"
    with (killed / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it for having looked


def cli(*words: str, expect: int = 0) -> str:
    done = CliRunner().invoke(app, words)
    code = done.exception.exit_code if isinstance(done.exception, ClipscaleError) else done.exit_code
    assert code == expect, done.output
    return done.output + (str(done.exception) if isinstance(done.exception, ClipscaleError) else "")


def test_commands(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", "seed=5", ended=75)
    assert re.search(r"one +done.*\n?.*two +preempted|two +preempted.*\n?.*one +done", cli("runs", "ls", str(tmp_path)))
    assert json.loads(cli("runs", "show", str(two), "--json"))["exit_code"] == ExitCode.PREEMPTED
    assert "goodput 50.0%" in cli("runs", "show", str(one))
    assert re.search(r"seed +0 +5", cli("runs", "diff", str(one), str(two)))
    assert cli("runs", "exit-code", str(one)) == "0\n"
    assert cli("runs", "exit-code", str(two), expect=75) == "75\n"
    (two / "result.json").unlink()
    assert "killed" in cli("runs", "exit-code", str(two), expect=1)
    assert "is no run" in cli("report", str(tmp_path / "three"), expect=2)


def test_they_need_no_torch() -> None:
    code = "import sys, clipscale.apps.runs, clipscale.apps.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "b"), make_run(tmp_path / "c")
    records = find_records(tmp_path)
    assert {record.name for record in records} == {"b", "c"}
    assert differing(records) == {"name": [record.name for record in records]}
    with pytest.raises(ConfigError, match="holds no runs"):
        find_records(tmp_path / "a" / "b" / "logs")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (-3, 7), (4.1, 4.11), (1e-9, 3e-9), (0, 1e12), (5, 5), (-2, -2), (0, 3)]
)
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high * (1 - 1e-9)
    assert 2 <= len(found) <= 8
    assert all(b > a for a, b in pairwise(found))


def test_many_points_become_few_within_their_range() -> None:
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    means, band = thinned([*points, (10_000.0, math.nan)])
    assert len(means) == len(band) == MOST
    assert min(low for _, low, _ in band) == min(y for _, y in points)
    assert thinned(points[:5]) == (points[:5], [])


def test_drawings_of_odd_points() -> None:
    for points in ([], [(0.0, 0.0)], [(5.0, 1.0), (5.0, 1.0)], [(1.0, math.nan)], [(1.0, math.inf), (2.0, 1e300)]):
        for zero in (True, False):
            assert "nan" not in draw([Curve("<a>", points)], str, zero, [(9.0, "<b>")])
            ElementTree.fromstring(draw([Curve("<a>", points)], str, zero, [(9.0, "<b>")]))


def test_the_share_of_waiting(tmp_path: Path) -> None:
    shares = wait_share(read_record(make_run(tmp_path / "run")))
    assert len(shares) == 19 and all(share == pytest.approx(0.25) for _, share in shares)


class _Pictures:
    """A set of ten images, each of one grey."""

    def read(self, start: int, stop: int) -> Iterator[EvalItem]:
        yield from (
            EvalItem(torch.full((3, 200, 200), 25 * i, dtype=torch.uint8), ("",), "", i) for i in range(start, stop)
        )


def test_examples_are_what_ranking_says() -> None:
    items = [EvalItem(torch.empty(0), ([f"thing {i}"],), "", i) for i in range(10)]
    right = torch.stack([torch.arange(10), torch.arange(10)])
    texts = [f"thing {i}" for i in range(10)]
    pairs = Pairs(_Pictures(), items, texts, torch.eye(10), torch.eye(10), right)  # type: ignore[arg-type]
    labels = torch.arange(40) % 20
    shown = Examples(pairs, Answers([f"class {i}" for i in range(20)], labels, labels.clamp(max=18))).shown()
    assert json.loads(json.dumps(shown)) == shown
    for asked in shown["retrieval"]:
        best, *others = asked["found"]
        assert best["right"] and best["caption"] == asked["caption"] and best["score"] == 1.0
        assert best["image"].startswith("data:image/jpeg;base64,")
        assert not any(one["right"] for one in others)
    assert shown["similarity"]["values"] == torch.eye(10).tolist()
    assert shown["confusion"]["classes"][-2:] == ["class 18", "class 19"]
    assert shown["confusion"]["counts"][-1][-2:] == [2, 0]
    assert Examples().shown() == {}


def test_a_sweep_is_ranked_and_drawn(tmp_path: Path) -> None:
    """Best first; what the commands varied, groups too; a run that measured nothing comes last."""
    for name, lr, model, score in (("a", "1e-3", "tiny", 0.2), ("b", "1e-2", "rn50", 0.5), ("c", "1e-4", "tiny", None)):
        path = make_run(tmp_path / name, f"optim.lr={lr}", f"model={model}", steps=0)
        if score is not None:
            metrics = {"val/retrieval/i2t_r1": score}
            write_result(path, "done", ExitCode.DONE, metrics=metrics, objective=score)
    invoke = CliRunner().invoke
    picture = tmp_path / "sweep.png"
    done = invoke(app, ["runs", "sweep", str(tmp_path), "--json", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [Path(row["run"]).name for row in found] == ["b", "a", "c"]
    assert found[0]["varied"] == {"optim.lr": "1e-2", "model": "rn50"} and found[2]["val/retrieval/i2t_r1"] is None
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for arguments, said in (([str(tmp_path / "a")], "is a single run"), ([str(tmp_path), "--plot", "x.jpg"], ".png")):
        with pytest.raises(ConfigError, match=re.escape(said)):
            invoke(app, ["runs", "sweep", *arguments], catch_exceptions=False)
