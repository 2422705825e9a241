"""The built site in headless Chromium: equations typeset, figures shown, search works, nothing lost on a phone.

Runs where the site has been built (`make docs`) and Chromium is installed.
"""

import functools
import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

HTML = Path(__file__).parents[2] / "docs" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the site is not built: make docs"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
]


@pytest.fixture(scope="module")
def site():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=HTML)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rendered(url, tmp_path, size="1280,1000"):
    """The page's DOM after its scripts have run."""
    out = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", f"--window-size={size}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return out.stdout


@pytest.mark.parametrize("page", ["how-it-works", "notebooks/rnn-ntk", "notebooks/batchnorm-ntk", "errata"])
def test_equations_are_typeset(site, tmp_path, page):
    dom = rendered(f"{site}/{page}.html", tmp_path)
    assert dom.count("<mjx-container") > 3
    assert "MathJax_Error" not in dom
    assert "data-mjx-error" not in dom
    visible = re.sub(r"<script.*?</script>|<mjx-container.*?</mjx-container>", "", dom, flags=re.S)
    assert r"\mathbb" not in visible


FIGURES = {
    "tutorial": 1,
    "notebooks/figure-1": 2,
    "notebooks/gp-kernels": 1,
    "notebooks/rnn-ntk": 2,
    "notebooks/transformer-ntk": 2,
    "notebooks/batchnorm-ntk": 2,
}


@pytest.mark.parametrize("page", FIGURES)
def test_figures_are_there(page):
    html = (HTML / f"{page}.html").read_text()
    article = html.split("<article", 1)[1].split("</article>", 1)[0]
    sources = [s for s in re.findall(r'<img[^>]*src="([^"]+)"', article) if not s.startswith("http")]
    assert len(sources) == FIGURES[page]
    for source in sources:
        assert (HTML / page).parent.joinpath(source).resolve().is_file(), source


def test_search_works(site, tmp_path):
    dom = rendered(f"{site}/search.html?q=transformer", tmp_path)
    assert "transformer-ntk.html" in dom


@pytest.mark.parametrize("page", ["index", "how-it-works", "notebooks/transformer-ntk", "neural-tangents", "api"])
def test_nothing_is_lost_on_a_phone(site, tmp_path, page):
    """No page is wider than a phone's screen: what is long scrolls by itself."""
    probe = tmp_path / "probe.html"
    probe.write_text("")
    script = (
        f"<iframe id=f src='{site}/{page}.html' width=390 height=800></iframe><script>setTimeout(() => {{"
        "const d = document.getElementById('f').contentDocument.documentElement;"
        "document.title = 'width ' + d.scrollWidth;}, 6000)</script>"
    )
    (HTML / "_probe.html").write_text(script)
    try:
        dom = rendered(f"{site}/_probe.html", tmp_path / "profile")
    finally:
        (HTML / "_probe.html").unlink()
    found = re.search(r"<title>width (\d+)</title>", dom)
    assert found, dom[:300]
    assert int(found.group(1)) <= 390
