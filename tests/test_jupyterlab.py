"""The notebook in a real JupyterLab in a real browser: what somebody sees who opens it and runs all cells."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import nbformat
import psutil
import pytest
from test_tutorial import EMBEDDED, NOTEBOOK, check_outputs, code_cells, copy_modules

pytestmark = pytest.mark.browser

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
# Root cannot have a sandbox.
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync window-size=1280,1200"
)
RED_TEXT = '.jp-RenderedText:is([data-mime-type$=".stderr"], [data-mime-type$=".error"])'  # errors are either

# Whether an element is what somebody sees at its place: not scrolled away, not hidden, not covered.
ON_SCREEN = """
    const onScreen = (element) => {
        const box = element.getBoundingClientRect();
        return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === element;
    };
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebook, without outputs so that none is taken for a new one, and of all modules."""
    folder = tmp_path_factory.mktemp("tutorial")
    copy_modules(folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / NOTEBOOK.name)
    return folder


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    """The folder for screenshots: BROWSER_SCREENSHOTS, or a temporary one."""
    folder = Path(os.environ.get("BROWSER_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser(screenshots, tmp_path_factory):
    """Chromium, driven by Selenium; the last thing that it shows is kept as a screenshot, also after a failure."""
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        pytest.fail(f"{CHROMIUM} or {CHROMEDRIVER} is missing: apt-get install chromium chromium-driver")
    from selenium import webdriver  # only `make test-browser` installs it

    own = str(tmp_path_factory.mktemp("chromium"))
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"user-data-dir={own}"):
        options.add_argument(f"--{flag}")
    environment = {**os.environ, "XDG_CONFIG_HOME": own, "XDG_CACHE_HOME": own}
    service = webdriver.ChromeService(
        str(CHROMEDRIVER),  # named, or it might be downloaded
        env=environment,
        popen_kw={"start_new_session": True},  # Ctrl-C ends the test alone, which then closes the browser
    )
    driver = webdriver.Chrome(options, service)
    process = psutil.Process(service.process.pid)
    family = [process, *process.children(recursive=True)]
    try:
        yield driver
        driver.save_screenshot(screenshots / "last.png")
    finally:
        end(family, driver.quit)


@pytest.fixture(scope="module")
def address(folder, browser, tmp_path_factory):
    """The address of the notebook in a JupyterLab with its default settings, three epochs set."""
    own = tmp_path_factory.mktemp("jupyter")  # settings and state: those of the user play no part
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    # conftest.py turns TensorFlow's log down, and a kernel under pytest does not show what compiled code logs.
    for name in ("TF_CPP_MIN_LOG_LEVEL", "PYTEST_CURRENT_TEST", "DATASET", "SEED", "OUTPUT_DIR"):
        environment.pop(name, None)
    environment |= {
        "EPOCHS": "3",
        "JUPYTER_TOKEN": "token",
        "IPYTHONDIR": str(own / "ipython"),
        **{f"JUPYTER_{name.upper()}_DIR": str(own / name) for name in ("config", "data", "runtime")},
        **{f"JUPYTERLAB_{name.upper()}_DIR": str(own / name) for name in ("settings", "workspaces")},
    }
    defaults = own / "config" / "labconfig" / "default_setting_overrides.json"
    defaults.parent.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}  # or it asks, and looks for them on the internet
    defaults.write_text(json.dumps({"@jupyterlab/apputils-extension:notification": quiet}))
    log = own / "log.txt"
    with log.open("w") as output:
        server = psutil.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as for the browser
        )

    def url():
        assert server.poll() is None, log.read_text()
        texts = [path.read_text() for path in (own / "runtime").glob("jpserver-*.json")]
        return json.loads(texts[0])["url"] if any(texts) else None  # empty while it is being written

    try:
        yield f"{wait_for(url, 60, log.read_text)}lab/tree/{NOTEBOOK.name}?token=token"
    finally:
        end([server], server.terminate)


@pytest.fixture(scope="module")
def bar_values(folder, address, browser, screenshots):
    """All cells are run and the notebook is saved; the values that the bar of the long training showed."""
    browser.get(address)
    wait_for(lambda: "Python 3 (ipykernel) | Idle" in status_bar(browser), 60, lambda: status_bar(browser))
    choose(browser, "Run", "Run All Cells")
    (training,) = [place for place, cell in enumerate(code_cells(saved(folder))) if "egm.fit(" in cell.source]
    values = []

    def has_ended():
        state = observe(browser, training)
        if state["bar"] is not None and state["bar"] not in values:
            values.append(state["bar"])
            if 0 < state["bar"] < 1:
                browser.save_screenshot(screenshots / "training.png")
        return "[*]:" not in state["prompts"]

    wait_for(lambda: "[*]:" in observe(browser, training)["prompts"], 20)
    wait_for(has_ended, 900, lambda: observe(browser, training))
    state = observe(browser, training)
    folded, *prompts = state["prompts"]
    assert folded == "" and all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts), state["red_text"]
    choose(browser, "File", "Save Notebook")
    wait_for(lambda: browser.execute_script("return !document.querySelector('.jp-mod-dirty')"), 20)
    return values


def saved(folder):
    return nbformat.read(folder / NOTEBOOK.name, as_version=4)


def wait_for(condition, seconds, explain=lambda: "waited in vain"):
    """Ask again and again until the answer is true, and return it."""
    latest = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < latest, explain()
        time.sleep(0.1)
    return answer


def end(processes, ask):
    """Ask processes to end, then end by force what is left of them and of all that they have started."""
    running = [process for process in processes if process.is_running()]
    family = {*running, *(child for process in running for child in process.children(recursive=True))}
    try:
        ask()
    finally:
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            process.kill()


def status_bar(browser):
    return browser.execute_script("return document.querySelector('#jp-main-statusbar')?.textContent ?? ''")


def choose(browser, menu, item):
    """Click on an item of a menu of JupyterLab."""

    def find(css, label):
        return [element for element in browser.find_elements("css selector", css) if element.text == label]

    wait_for(lambda: find(".lm-MenuBar-itemLabel", menu), 20)[0].click()
    wait_for(lambda: find(".lm-Menu-itemLabel", item), 20)[0].click()


def observe(browser, training):
    """What the page shows: prompts, red text, and the bar of the training while that cell runs."""
    script = """
        const [training, redText] = arguments;
        const cells = [...document.querySelectorAll(".jp-CodeCell")];
        const prompts = cells.map((cell) => cell.querySelector(".jp-InputPrompt").textContent);
        const bar = prompts[training] === "[*]:" ? cells[training].querySelector("progress") : null;
        if (bar && !onScreen(bar)) bar.scrollIntoView({block: "center"});
        return {
            prompts,
            red_text: [...document.querySelectorAll(redText)].map((output) => output.textContent),
            bar: bar && onScreen(bar) ? bar.value : null,
        };
    """
    return browser.execute_script(ON_SCREEN + script, training, RED_TEXT)


def image_size(browser, name):
    """Scroll to the output with an image; its natural size (width, height) once it is loaded and seen."""
    script = """
        const image = document.querySelector(`.jp-OutputArea img[alt="${arguments[0]}"]`);
        if (image && !onScreen(image)) image.parentElement.scrollIntoView({block: "center"});
        return image?.complete && onScreen(image) ? [image.naturalWidth, image.naturalHeight] : null;
    """
    return browser.execute_script(ON_SCREEN + script, name)


def test_progress_bar_moves(bar_values):
    assert len(bar_values) >= 2
    assert bar_values == sorted(bar_values)


def test_all_cells_end_without_error_or_stderr(bar_values, browser, folder):
    assert observe(browser, 0)["red_text"] == []
    check_outputs(saved(folder))


def test_gifs_are_shown_inline(bar_values, browser, folder, screenshots):
    for name in EMBEDDED:
        width, height = wait_for(lambda name=name: image_size(browser, name), 20)
        assert (height, width) == iio.imread(folder / "example_images" / name).shape[1:3]
    browser.save_screenshot(screenshots / "gifs.png")


def test_slider_moves_the_noise_level(bar_values, browser, screenshots):
    picture = "img.widget-image"

    def source():
        return browser.execute_script(f"return document.querySelector('{picture}')?.src")

    before = wait_for(source, 20)
    slider = browser.find_element("css selector", ".widget-slider .noUi-handle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    slider.send_keys("\ue014" * 3)  # the right arrow key
    wait_for(lambda: source() not in (None, before), 60)
    browser.save_screenshot(screenshots / "slider.png")


def test_figures_and_results_are_shown(bar_values, browser, folder, screenshots):
    outputs = [output for cell in code_cells(saved(folder)) for output in cell.outputs]
    num_figures = sum("image/png" in output.get("data", {}) for output in outputs) - 1  # the slider shows its own
    script = "return [...document.querySelectorAll('.jp-RenderedImage img')].map((image) => image.naturalWidth)"
    widths = browser.execute_script(script)
    assert len(widths) == num_figures > 0
    assert min(widths) > 0
    script = """
        const table = document.querySelector(".jp-OutputArea table");
        table.scrollIntoView({block: "center"});
        return table.innerText;
    """
    assert "generator tv" in browser.execute_script(script)
    browser.save_screenshot(screenshots / "results.png")
