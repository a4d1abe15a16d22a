"""A person's path through the panel in a real Chromium: `make test-browser`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from megaflux.infer import __main__ as infer
from tests.conftest import picture
from tests.panel import bad_files

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium here (on Debian: apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def served(run_folder, tmp_path_factory):
    """(address, output folder) of a panel that runs as a person starts it; ended as Ctrl-C ends it."""
    out = tmp_path_factory.mktemp("panel")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "megaflux.panel",
        "--checkpoint",
        run_folder,
        "--port",
        port,
        "--out",
        out / "outputs",
    ]
    log = out / "log"
    # A proxy must not see the page: gradio asks its own address whether it is up. Nor must it be understood.
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5h://127.0.0.1:9"}
    environment |= {"GRADIO_TEMP_DIR": str(out / "gradio")}
    environment |= {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # on some processors the sums of two round otherwise
    with log.open("w") as stream:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=environment, restore_signals=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while f"panel: {address}  (Ctrl-C stops)" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address, out / "outputs"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(20)
        finally:
            process.kill()
    assert code == 0 and log.read_text().endswith("panel: stopped\n"), log.read_text()
    assert "Traceback" not in log.read_text()
    assert list((out / "outputs").glob("*-seed*.png"))  # what goes with the panel is its temporary files alone


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 800},
        )
        context.set_default_timeout(20_000)
        yield context
        context.close()


@pytest.fixture
def page(served, browser):
    """A fresh page of the panel. It must ask no other machine for anything, and throw no error."""
    page, foreign, errors = browser.new_page(), [], []
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((served[0], "data:", "blob:")) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served[0])
    page.wait_for_selector("#generate")
    yield page
    page.close()
    assert not foreign and not errors


def drop(page, file: Path) -> None:
    page.set_input_files("#reference input[type=file]", str(file))


def status(page, text: str) -> str:
    """Wait until the status line holds the text; the line."""
    page.wait_for_selector(f"#status .line:has-text({json.dumps(text, ensure_ascii=False)})")
    return page.inner_text("#status")


def heat_map(page, before: str | None = None) -> str:
    """The address of the heat-map, once it is another than before."""
    page.wait_for_function(
        "old => { const i = document.querySelector('#grid img'); return i && i.src != old }", arg=before
    )
    return page.locator("#grid img").get_attribute("src")


def click(page, x: float, y: float) -> None:
    """Click the heat-map at (x, y) in 0..1."""
    box = page.locator("#grid img").bounding_box()
    page.locator("#grid img").click(position={"x": x * box["width"], "y": y * box["height"]})


def number(page, name: str, value: float) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")


def test_from_a_picture_to_pictures_and_back(page, served, tmp_path):
    picture(160, 120, 1).save(tmp_path / "cat.png")
    drop(page, tmp_path / "cat.png")
    plain = heat_map(page)
    assert "cat.png: 2 rows × 2 columns of tokens, each of weight 1" in page.inner_text("#grid-line")
    assert "it is not a crop" in page.inner_text("body")

    click(page, 0.3, 0.4)
    dotted = heat_map(page, plain)
    page.wait_for_selector("#grid-line:has-text('dot 1 of 1')")
    number(page, "weight", 9)
    page.wait_for_selector("#grid-line:has-text('weights 1 to 2.')")
    assert page.input_value("#weight input[type=number]") == "4"
    dotted = heat_map(page)
    number(page, "weight", 0)  # the sliders move the dot that was put last
    weaker = heat_map(page, dotted)
    page.wait_for_selector("#grid-line:has-text('weights 0.')")
    number(page, "background", 0.5)
    lower = heat_map(page, weaker)
    page.get_by_label("Preserve mass").check()
    heavier = heat_map(page, lower)
    page.get_by_text("Dots as numbers").click()
    cells = [page.get_by_test_id(f"cell-0-{column}") for column in range(4)]
    assert [float(cell.inner_text()) for cell in cells] == pytest.approx([0.3, 0.4, 0.3, 0], abs=0.01)
    cells[2].dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type("0.6")
    page.keyboard.press("Enter")
    heavier = heat_map(page, heavier)
    assert page.input_value("#radius input[type=number]") == "0.6"
    click(page, 0.8, 0.8)
    two = heat_map(page, heavier)
    page.wait_for_selector("#grid-line:has-text('dot 2 of 2')")
    page.click("#undo")
    heat_map(page, two)

    number(page, "steps", 2)
    number(page, "seed", 7)
    page.click("#generate")
    assert "4 pictures of 64 × 64 px" in status(page, "saved in")
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    assert [c.strip() for c in captions] == ["seed 7", "seed 8", "seed 9", "seed 10"]
    assert page.evaluate("[...document.querySelectorAll('#gallery img')].every(i => i.naturalWidth == 64)")

    page.locator("#gallery .thumbnail-item").nth(2).click()
    page.wait_for_selector("#chosen:has-text('seed 9')")
    page.wait_for_timeout(300)  # the button's link follows its label
    with page.expect_download() as download:
        page.click("#settings")
    settings = json.loads(Path(download.value.path()).read_text())
    assert settings["seed"] == 9 and settings["job"]["seeds"] == [7, 8, 9, 10] and settings["job"]["steps"] == 2
    (dot,) = settings["job"]["references"][0]["dots"]
    assert dot["weight"] == 0 and settings["job"]["background"] == 0.5 and settings["job"]["preserve_mass"]
    made = served[1] / "cat-seed9.png"
    assert settings == json.loads(Image.open(made).text["megaflux"])

    page.click("#use")
    status(page, "Seed 9 is the reference now")
    page.wait_for_selector("#grid-line:has-text('cat-seed9.png')")
    assert "dot" not in page.inner_text("#grid-line")
    page.click("#generate")
    status(page, "4 pictures of 64 × 64 px")
    page.wait_for_selector("#chosen:has-text('cat-seed9-seed7.png')")
    assert (
        json.loads(Image.open(served[1] / "cat-seed9-seed7.png").text["megaflux"])["job"]["references"][0]["dots"] == []
    )

    for file in (made, served[1] / "cat-seed9-seed7.png"):
        assert infer.main(["--from-image", str(file), "--out", str(tmp_path / "again")]) == 0
        assert Image.open(tmp_path / "again" / file.name).tobytes() == Image.open(file).tobytes()


def test_bad_uploads_leave_a_line_and_a_page_that_works(page, tmp_path):
    for file, said in bad_files.write(tmp_path).items():
        drop(page, file)
        status(page, said.split(":")[0])
        assert said in page.inner_text("#status")
        assert not page.locator("#grid img").count()
    picture(64, 64, 2).save(tmp_path / "good.png")
    drop(page, tmp_path / "good.png")
    heat_map(page)
    status(page, "Reference: good.png")
    number(page, "steps", 0)
    page.click("#generate")
    status(page, "steps: 0; use 1 to 100000")
    number(page, "steps", 1)
    number(page, "count", 1)
    page.click("#generate")
    status(page, "1 picture of 64 × 64 px")


def test_modes_show_what_they_use_and_a_mask_is_clicked(page, tmp_path):
    def choose(label: str) -> None:
        page.click("#mode input")
        page.get_by_role("option", name=label).click()

    picture(64, 64, 2).save(tmp_path / "room.png")
    choose("text: a prompt alone")
    page.wait_for_selector("#reference", state="detached")
    page.click("#generate")
    status(page, "mode text needs words")
    choose("controlnet: keep depth or lines")
    page.wait_for_selector("text=No ControlNet is loaded")
    choose("inpaint: a part made anew")
    page.set_input_files("#start input[type=file]", str(tmp_path / "room.png"))
    page.wait_for_selector("#begin img")
    before = page.locator("#begin img").get_attribute("src")
    page.locator("#begin img").click()
    page.wait_for_function("old => document.querySelector('#begin img').src != old", arg=before)
    number(page, "steps", 2)
    page.click("#generate")
    status(page, "4 pictures of 64 × 64 px")


def test_stop_and_the_progress_bar(page, tmp_path):
    picture(64, 64, 2).save(tmp_path / "long.png")
    drop(page, tmp_path / "long.png")
    heat_map(page)
    number(page, "steps", 5000)
    page.click("#generate")
    page.wait_for_selector("#gallery :text('steps |')")
    # Its width as set, not as drawn: each report restarts the 150 ms transition before it, so a browser that draws
    # few frames, as a headless one does, keeps the bar at nothing for many seconds.
    page.wait_for_function("parseFloat(document.querySelector('#gallery .progress-bar')?.style.width) > 0")
    page.click("#stop")
    status(page, "Stopped; nothing was saved")
    number(page, "steps", 1)
    page.click("#generate")
    status(page, "4 pictures of 64 × 64 px")
