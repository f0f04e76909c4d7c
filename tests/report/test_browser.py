"""The report in headless Chromium: it renders without console errors, and axe-core finds no serious violation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lightning_gradmetrics.report import write_report
from tests.report.report_runs import make_run

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
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"), intervals=True, comparisons=True, not_finite=2)
    (run / "figures").mkdir()
    (run / "figures" / "map.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    content = json.loads((run / "metrics.json").read_text())
    content["figures"] = [{"file": "figures/map.svg", "title": "A map", "caption": "Of one layer."}]
    (run / "metrics.json").write_text(json.dumps(content))
    return write_report(run)


def browse(chromium: str, page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """Open a page, and return the document after its scripts have run, and the console's messages."""
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_page_renders_without_console_messages(chromium, report, tmp_path, window):
    width, height = WINDOWS[window]
    picture = tmp_path / "page.png"
    flags = (f"--window-size={width},{height}", f"--screenshot={picture}")
    _, console = browse(chromium, report, tmp_path, *flags)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(chromium, axe, report, tmp_path, scheme):
    page, text = tmp_path / "audited.html", report.read_text().replace("<details>", "<details open>")
    page.write_text(text.replace("</body>", f"<script>{axe}</script>{AUDIT}</body>"))
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    document, _ = browse(chromium, page, tmp_path, "--dump-dom", "--virtual-time-budget=60000", *dark)
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', document, re.DOTALL)
    assert found is not None and found[1], "axe did not finish"
    violations = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    assert not serious, "\n".join(f"{each['id']}: {each['nodes'][:3]}" for each in serious)
