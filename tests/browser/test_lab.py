"""A chapter in JupyterLab, in a real browser: all cells run, each widget is moved, its picture changes.

Needs a Chromium from the system (apt install chromium, or Chrome); skipped where there is none. One chapter is tried
with the other tests; all of them, one after the other, by `pytest -m browser_all`.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from minids.course.notebooks import normal

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt install chromium)")
FLAGS = "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --disable-background-networking"

IDLE = """() => {
    const indicator = document.querySelector('.jp-Notebook-ExecutionIndicator')
    const prompts = [...document.querySelectorAll('.jp-InputPrompt')]
    return indicator?.dataset.status === 'idle' && !prompts.some(prompt => prompt.textContent.includes('*'))
}"""
PICTURE_DIFFERS = "([picture, before]) => picture.src !== before"
CONTROLS = ".widget-hslider .noUi-handle, .widget-dropdown select, .widget-checkbox input"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def server_command(folder):
    """What `python3 course.py` starts, with another folder as the course: a browser saves what it opens."""
    spec = importlib.util.spec_from_file_location("course", ROOT / "course.py")
    course = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(course)
    course.ROOT = folder
    return [sys.executable, "-m", *course.command_of("lab")]


@contextmanager
def lab(folder):
    """The address of a JupyterLab on `folder`, as `/tree/NOTEBOOK` is to be appended."""
    port = free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    options.append("--IdentityProvider.token=t")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(folder)}
    environment.pop("PYTHONSTARTUP", None)  # that of the tests' own kernels
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            server_command(folder) + options, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(240):
                assert server.poll() is None, (folder / "server.log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=t", timeout=2).read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield lambda notebook: f"http://127.0.0.1:{port}/lab/workspaces/test/tree/{notebook}?token=t&reset"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def open_page(address, minutes):
    """The page in a headless Chromium, and what it complains about; `minutes` are for each thing that is waited for."""
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        complaints = listen(page)
        page.set_default_timeout(minutes * 60_000)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle")  # without a kernel the menu would ask for one
        try:
            yield page, complaints
        finally:
            browser.close()


def listen(page):
    """Exceptions, and errors on the console, from now on; but for downloads, as there may be no network."""
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def heard(said):
        if said.type == "error" and not said.text.startswith("Failed to load resource"):
            complaints.append(said.text)

    page.on("console", heard)
    return complaints


def run_all_cells(page):
    page.click('.lm-MenuBar-item:has-text("Run")')
    page.click('.lm-Menu-item:has-text("Run All Cells")')
    page.wait_for_selector(".widget-image")
    page.wait_for_function(IDLE)


def widgets(page):
    return page.locator(".jp-OutputArea-output .widget-vbox:has(.widget-image)").all()


def move_first_control(page, widget):
    """Move it by a step; the others may say nothing, depending on where it stands. Fails if the picture stays."""
    picture, control = widget.locator(".widget-image"), widget.locator(CONTROLS).first
    before = picture.get_attribute("src")
    assert before.startswith("blob:")
    control.scroll_into_view_if_needed()
    if control.evaluate("element => element.tagName") == "SELECT":
        control.select_option(index=1)
    elif control.get_attribute("type") == "checkbox":
        control.click()
    else:
        control.focus()
        page.keyboard.press("ArrowRight")
    page.wait_for_function(PICTURE_DIFFERS, arg=[picture.element_handle(), before])


def errors(page):
    return page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()


def walk_through(chapter, folder):
    """Run the chapter on a copy of it, and move what can be moved. Fails if the page or a cell complains."""
    (folder / "chapters").mkdir()
    shutil.copy(chapter, folder / "chapters")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")  # chapters read results from there
    cells = nbformat.read(chapter, as_version=4).cells
    meant_to_fail = sum("raises-exception" in cell.metadata.get("tags", []) for cell in cells)
    explorers = sum("Explorer(" in output.get("data", {}).get("text/plain", "") for output in outputs(cells))
    with lab(folder) as address, open_page(address(f"chapters/{chapter.name}"), minutes=10) as (page, complaints):
        run_all_cells(page)
        assert len(errors(page)) == meant_to_fail
        shown = widgets(page)
        assert len(shown) == explorers > 0
        for widget in shown:
            move_first_control(page, widget)
        assert complaints == []


def outputs(cells):
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def test_a_chapter_runs_and_its_widget_answers(tmp_path):
    walk_through(ROOT / "chapters" / "02_mla.ipynb", tmp_path)


@pytest.mark.browser_all
@pytest.mark.parametrize("chapter", sorted((ROOT / "chapters").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_runs_and_its_widgets_answer(chapter, tmp_path, request):
    if "browser_all" not in request.config.option.markexpr:
        pytest.skip("takes as long as all chapters do: pytest -m browser_all")
    walk_through(chapter, tmp_path)


BROKEN = """
from IPython.display import Javascript, display
from matplotlib.figure import Figure
from minids.course.widgets import Explorer

def draw(k):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, k])
    return figure

class Broken(Explorer):
    def _moved(self, change):
        pass

    def _ipython_display_(self):
        display(Javascript("console.error('planted')"), self._box)

{kind}(draw, k=(1, 5, 2))
"""


@pytest.mark.parametrize("kind", ["Explorer", "Broken"])
def test_a_broken_widget_would_be_noticed(tmp_path, kind):
    """The same steps on a notebook with one widget: they pass with a sound one, and fail when nothing is redrawn."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BROKEN.format(kind=kind))])
    nbformat.write(normal(notebook), tmp_path / "widget.ipynb")
    with lab(tmp_path) as address, open_page(address("widget.ipynb"), minutes=2) as (page, complaints):
        run_all_cells(page)
        (widget,) = widgets(page)
        if kind == "Explorer":
            move_first_control(page, widget)
            assert complaints == []
            return
        assert complaints == ["planted"]
        page.set_default_timeout(5_000)
        with pytest.raises(Exception, match="Timeout"):
            move_first_control(page, widget)
