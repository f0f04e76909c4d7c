"""The report in headless Chromium: it renders without console errors, and axe-core finds no serious violation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_gradmetrics.classifier.batches import split_batch
from lightning_gradmetrics.pictures import write_thumbnails
from lightning_gradmetrics.report import listed_samples, write_report
from lightning_gradmetrics.report.comparison import write_comparison
from tests.report.report_runs import SETS, make_run

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
WINDOWS = {"desk": (1200, 1000), "phone": (390, 800)}

AUDIT = """
<pre id="axe-result"></pre>
<script>
axe.run(document, {resultTypes: ["violations"]}).then(result => {
  const found = result.violations.map(each => ({id: each.id, impact: each.impact, nodes: each.nodes.map(node => node.html)}));
  document.getElementById("axe-result").textContent = JSON.stringify(found);
});
</script>
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium() -> str:
    """Return the browser's path; the tests are skipped without one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no Chromium: install Debian's package chromium to check the report in a browser")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the source of axe-core, from the npm registry."""
    folder, npm = tmp_path_factory.mktemp("axe"), shutil.which("npm")
    if npm is None:
        pytest.skip("no npm to download axe-core with")
    done = subprocess.run(
        [npm, "pack", "--silent", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        pytest.skip(f"npm could not download axe-core: {done.stderr[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


@pytest.fixture(scope="module")
def pages(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the report of a run, and the comparison of three runs."""
    rows = []
    for score in ("max_softmax", "energy", "oberdiek"):
        for metric in ("auroc", "fpr95"):
            place = {"task": "ood", "dataset": "svhn", "group": "far", "metric": metric, "fit": "fitted on labels"}
            rows.append({"score": score, **place, "value": "0.9"})
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    runs = {"sweep/0": rows, "sweep/1": rows, "sweep/2": rows}
    return {"report": report, "comparison": write_comparison(runs, path, {"sweep/1": "seed=1"})}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"), intervals=True, comparisons=True, not_finite=2)
    (run / "figures").mkdir()
    (run / "figures" / "map.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    content = json.loads((run / "metrics.json").read_text())
    content["figures"] = [{"file": "figures/map.svg", "title": "A map", "caption": "Of one layer."}]
    (run / "metrics.json").write_text(json.dumps(content))
    sets = {name: TensorDataset(torch.rand(rows, 3, 32, 32), torch.zeros(rows)) for name, _, rows, _ in SETS}
    write_thumbnails(run, sets, listed_samples(run), split_batch)
    return write_report(run)


def browse(chromium: str, page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """Open a page, and return the document after its scripts have run, and the console's messages."""
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_page_renders_without_console_messages(chromium, pages, tmp_path, window, name):
    width, height = WINDOWS[window]
    picture = tmp_path / "page.png"
    flags = (f"--window-size={width},{height}", f"--screenshot={picture}")
    _, console = browse(chromium, pages[name], tmp_path, *flags)
    assert console == ""
    assert picture.stat().st_size > 20_000


def test_a_click_on_a_heading_sorts_the_table(chromium, report, tmp_path):
    click = "<script>document.querySelectorAll('.sortable th button')[0].click()</script></body>"
    page = tmp_path / "sorted.html"
    page.write_text(report.read_text().replace("</body>", click))
    document, console = browse(chromium, page, tmp_path, "--dump-dom")
    assert console == ""
    body = document[document.index('class="sortable"') :]
    names = [
        re.sub("<wbr>", "", name) for name in re.findall(r'<span class="name">(.*?)</span>', body.split("</table>")[0])
    ]
    assert len(names) > 10
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(chromium, axe, pages, tmp_path, scheme, name):
    page, text = tmp_path / "audited.html", pages[name].read_text().replace("<details>", "<details open>")
    page.write_text(text.replace("</body>", f"<script>{axe}</script>{AUDIT}</body>"))
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    document, _ = browse(chromium, page, tmp_path, "--dump-dom", "--virtual-time-budget=60000", *dark)
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', document, re.DOTALL)
    assert found is not None and found[1], "axe did not finish"
    violations = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    assert not serious, "\n".join(f"{each['id']}: {each['nodes'][:3]}" for each in serious)


ROWS_OF_CARDS = """
<pre id="cards"></pre>
<script>
const boxes = [...document.querySelectorAll(".card")].map(card => card.getBoundingClientRect());
const tops = Map.groupBy(boxes, box => Math.round(box.top));
const bottom = Math.max(...boxes.map(box => box.bottom));
document.getElementById("cards").textContent = JSON.stringify({rows: [...tops.values()].map(row => row.length), bottom});
</script>
"""


@pytest.fixture(scope="module")
def page_of_cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    others = (("birds", "birds", 60, False), ("cars", "cars", 60, False))
    page, run = folder / "cards.html", make_run(folder / "run", sets=[*SETS, *others], intervals=True)
    page.write_text(write_report(run).read_text().replace("</body>", f"{ROWS_OF_CARDS}</body>"))
    return page


@pytest.mark.parametrize(("width", "rows"), [(500, [1] * 5), (800, [3, 2]), (1280, [5])])
def test_no_card_is_alone_in_a_row_of_a_wide_window(chromium, page_of_cards, tmp_path, width, rows):
    document, console = browse(chromium, page_of_cards, tmp_path, f"--window-size={width},900", "--dump-dom")
    assert console == ""
    found = re.search(r'<pre id="cards">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    cards = json.loads(found[1])
    assert cards["rows"] == rows
    assert width < 1280 or cards["bottom"] < 1000  # the first screen


TAB_STOPS = """
<pre id="stops"></pre>
<script>
const stops = [...document.querySelectorAll("a[href], button, summary, [tabindex='0']")].filter(each => each.checkVisibility());
const outlines = stops.slice(0, 20).map(each => { each.focus({focusVisible: true}); return getComputedStyle(each).outlineStyle; });
const links = stops.findIndex(each => !each.closest("nav"));
document.getElementById("stops").textContent = JSON.stringify({links, outlines});
</script>
"""


def test_every_section_is_within_fifteen_tab_stops_and_focus_is_visible(chromium, report, tmp_path):
    """The links to the sections come first."""
    page = tmp_path / "stops.html"
    page.write_text(report.read_text().replace("</body>", f"{TAB_STOPS}</body>"))
    document, console = browse(chromium, page, tmp_path, "--dump-dom")
    assert console == ""
    found = re.search(r'<pre id="stops">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    stops = json.loads(found[1])
    assert 5 <= stops["links"] <= 14
    assert set(stops["outlines"]) == {"solid"}
