"""The panel without a browser: acts on dots, jobs, heat-maps, and the page's handlers with a small run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megaflux.common.errors import UserError
from megaflux.generation.job import MODES, Job, Runtime
from megaflux.infer import __main__ as infer
from megaflux.infer.load import Loaded, load
from megaflux.panel import __main__ as panel
from megaflux.panel import state
from megaflux.panel.files import store
from megaflux.panel.request import in_page_words, job_of
from megaflux.panel.serve import give_gradio_a_folder
from megaflux.panel.state import Form, Session, Stored
from tests.conftest import picture
from tests.generation.test_modes import controlnet_folder  # noqa: F401  (a fixture)
from tests.panel import bad_files
from tests.test_convert import converted, release  # noqa: F401
from tests.test_convert import pipeline as with_t5  # noqa: F401

pytest.importorskip("gradio")
REQUEST = SimpleNamespace(session_hash="a page")


def stored(size=(200, 100)) -> Stored:
    return Stored("/pictures/cat.png", "0" * 64, size)


def dotted(*clicks, size=(200, 100)) -> Session:
    session = Session(reference=stored(size))
    for x, y in clicks:
        session = state.clicked(session, x, y, 0.3, 2.0)
    return session


# What a person does, as data


def test_a_click_is_the_middle_of_its_pixel_and_stays_inside():
    assert state.place([0, 99], (100, 100)) == (0.005, 0.995)
    assert state.place([511, -3], (512, 384)) == (0.999, 0.0)


def test_clicks_put_dots_and_take_them_up_again():
    session = dotted((0.25, 0.5), (0.75, 0.5))
    assert [(d.x, d.y) for d in session.dots] == [(0.25, 0.5), (0.75, 0.5)] and session.current == 1
    again = state.clicked(session, 0.26, 0.51, 0.9, 0.0)  # 2.2 px off, of a shorter side of 100
    assert again.dots == session.dots and again.current == 0
    assert len(state.clicked(session, 0.27, 0.5, 0.9, 0.0).dots) == 3  # 4 px off


def test_sliders_move_the_current_dot_and_a_drag_is_one_step_back():
    session = dotted((0.25, 0.5), (0.75, 0.5))
    for weight in (1.5, 1.0, 0.5):
        session = state.slid(state.slid(session, "radius", 0.4), "weight", weight)
    assert [(d.radius, d.weight) for d in session.dots] == [(0.3, 2.0), (0.4, 0.5)]
    assert state.undone(session).dots == dotted((0.25, 0.5), (0.75, 0.5)).dots
    assert state.slid(Session(reference=stored()), "weight", 3.0).dots == ()


def test_removing_clearing_and_going_back():
    session = dotted((0.25, 0.5), (0.75, 0.5))
    assert [d.x for d in state.removed(state.selected(session, 0)).dots] == [0.75]
    cleared = state.cleared(session)
    assert cleared.dots == () and cleared.current is None
    back = state.undone(cleared)
    assert back.dots == session.dots and back.current == 1
    assert state.undone(state.undone(state.undone(back))).dots == ()


def test_the_table_of_dots():
    session = dotted((0.25, 0.5))
    session = state.edited(session, [[0.5, "0.5", 0.2, 3], ["", "", "", ""], ["0.1", None, "", float("nan")]], 0.3, 2.0)
    assert [tuple(d.model_dump().values()) for d in session.dots] == [(0.5, 0.5, 0.2, 3.0), (0.1, 0.5, 0.3, 2.0)]
    for row, said in (
        ([2, 0, 1, 1], "dot 1: x: 2.0; must be inside"),
        (["a", 0, 1, 1], "dot 1: x: a; give a number"),
        ([0, 0, 0, 1], "radius: 0.0; must be above 0"),
        ([0, 0, 1, -1], "must be at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            state.edited(session, [row], 0.3, 2.0)


def test_another_reference_has_no_dots_and_no_mask_of_the_one_before():
    session = state.masked_at(dotted((0.5, 0.5)), "discs", 0.5, 0.5, 0.2)
    other = state.with_reference(session, stored((64, 64)))
    assert other.dots == () and other.discs == () and other.history == ()


def test_a_job_holds_what_its_mode_uses_and_no_more():
    full = Session(
        reference=stored(),
        start=stored((64, 64)),
        mask=stored((64, 64)),
        maps={"depth": stored()},
        dots=dotted((0.5, 0.5)).dots,
    )
    for mode in MODES:
        job = job_of(full, Form(mode=mode, prompt="a fox", controls=(("depth", 0.4),), seed=7, count=3, variety=0.1))
        assert job == Job.model_validate(job.model_dump()) and job.mode == mode and job.seeds == (7, 8, 9)
        assert bool(job.references) == (mode != "text") and bool(job.controls) == ("controlnet" in mode)
        assert (job.image is not None) == (mode not in ("text", "variation"))
        assert (job.mask is not None) == ("inpaint" in mode)
        assert job.variety == (0.1 if mode != "text" else 0.0)
    assert job.references[0].dots == full.dots and job.controls[0].image.sha256 == "0" * 64
    assert job_of(full, Form(aspect="16:9")).aspect == "16:9" and job_of(full, Form(aspect="auto")).aspect is None
    assert job_of(full, Form(aspect=state.MATCH)).match_input_size
    guided, plain = job_of(full, Form(cfg=3.0, negative=" rain ")), job_of(full, Form())
    assert (guided.cfg, guided.negative, plain.cfg, plain.negative) == (3.0, "rain", 1.0, "")
    assert (
        job_of(full, Form(release_compatible=True)).release_compatible and not job_of(full, Form()).release_compatible
    )


@pytest.mark.parametrize(
    ("session", "form", "said"),
    [
        (Session(), {}, "mode variation needs a reference; drop a picture"),
        (Session(), {"mode": "text"}, "mode text needs words"),
        (Session(), {"mode": "img2img"}, "mode img2img needs a picture to begin with"),
        (dotted(), {"mode": "inpaint"}, "mode inpaint needs a mask"),
        (dotted(), {"mode": "controlnet"}, "mode controlnet needs a control"),
        (dotted(), {"mode": "controlnet", "controls": (("canny", None),)}, "canny scale: empty"),
        (dotted(), {"steps": None}, "steps: empty"),
        (dotted(), {"steps": 0}, "^steps: 0; use 1 to 100000"),
        (dotted(), {"count": 65}, "pictures: 65; use 1 to 64"),
        (dotted(), {"seed": -1}, "seed: -1"),
        (dotted(), {"reference_strength": 0.0}, "reference strength: 0"),
        (dotted(), {"variety": 1.0}, "variety: 1.0"),
        (dotted(), {"guidance": -1.0}, "^guidance: -1.0"),
        (dotted(), {"background": -1.0}, "background: -1.0"),
        (dotted(), {"cfg": None}, "^true CFG scale: empty; give a number"),
        (dotted(), {"cfg": 101.0}, "^true CFG scale: 101.0; use 0 to 100"),
        (dotted(), {"negative": "rain"}, "^negative prompt: without effect at true CFG scale 1; give true CFG scale"),
        (dotted(), {"cfg": 3.0, "negative": "a\0"}, "^negative prompt: character 2 is NUL"),
    ],
)
def test_an_invalid_form_is_one_line(session, form, said):
    with pytest.raises(UserError, match=said) as caught:
        job_of(session, Form(**form))
    assert "\n" not in in_page_words(str(caught.value))


def test_the_page_has_no_options_but_those_of_the_start():
    assert in_page_words("--match-input-size: there is no picture\n") == "match input size: there is no picture"
    assert in_page_words("--mask-point: give --mask FILE") == "mask point: give mask FILE"
    assert in_page_words("give --depth-model DIR or --control-image x") == "give --depth-model DIR or control image x"


def test_uploads_are_kept_once_under_the_output_folder(tmp_path):
    (tmp_path / "up").mkdir()
    upload, out = tmp_path / "up/a cat!.PNG", tmp_path / "out"
    picture(40, 30).save(upload, "PNG")
    first, second = store(upload, out), store(upload, out)
    assert first == second and first.size == (40, 30) and Path(first.file).read_bytes() == upload.read_bytes()
    assert Path(first.file).is_relative_to(out / "inputs") and first.name == "a_cat_.PNG"
    assert store(first.file, out) == first  # a result, or an input, is where it belongs
    with pytest.raises(UserError, match="gone.png: No such file"):
        store(tmp_path / "gone.png", out)


def test_bad_files_are_refused_by_name_and_not_kept(tmp_path):
    for file, said in bad_files.write(tmp_path).items():
        with pytest.raises(UserError) as caught:
            store(file, tmp_path / "out")
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# The command line


def test_help_and_bad_lines_wait_for_nothing():
    code = "import sys; from megaflux.panel import __main__ as panel\ntry: panel.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('gradio', 'torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--sam-model" in done.stdout and done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "megaflux.panel"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: --checkpoint: missing; give a run's folder or an export's\n"


def test_bad_command_lines(run_folder, tmp_path, monkeypatch):
    given = ["--checkpoint", str(run_folder), "--out", str(tmp_path / "out")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken; give --port N"):
            panel.main([*given, "--port", str(port)])
    for port in ("0", "70000"):
        with pytest.raises(UserError, match=f"--port {port}: use 1 to 65535"):
            panel.main([*given, "--port", port])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        panel.main(["--checkpoint", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="see python -m megaflux.panel --help"):
        panel.main([*given, "--nonsense"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio .*pip install 'megaflux\[panel\]'"):
        panel.main([*given, "--port", str(free_port())])
    assert not (tmp_path / "out").exists()


SERVES_AN_EMPTY_PAGE = """
import os, signal, sys, threading, urllib.request
from pathlib import Path
from megaflux.panel import serve

serve.quiet_gradio()
serve.give_gradio_a_folder()
with serve.without_proxies():
    import gradio
with serve.without_proxies(), gradio.Blocks(analytics_enabled=False, delete_cache=(3600, 86400)) as page:
    gradio.Image()
page.stop_all = lambda: None

def upload():
    body = b'--x\\r\\nContent-Disposition: form-data; name="files"; filename="a.png"\\r\\n\\r\\n1\\r\\n--x--\\r\\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    address = f"http://127.0.0.1:{sys.argv[1]}/gradio_api/upload"
    try:
        print(urllib.request.urlopen(urllib.request.Request(address, body, headers)).read().decode(), os.environ["ALL_PROXY"])
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

def when_it_is_up(text, **more):
    if "Ctrl-C stops" in text:
        threading.Timer(0.2, upload).start()
serve.print = when_it_is_up
serve.serve(page, int(sys.argv[1]), Path(sys.argv[2]), {})
"""


def test_a_socks_proxy_and_anothers_temporary_folder_do_not_matter(tmp_path):
    """What Gradio alone would do: its clients refuse to be made, and gradio/ in TMPDIR is not ours to write in."""
    (tmp_path / "gradio").touch()  # a folder of another user cannot be made here; this can be written in as little
    socks = dict.fromkeys(("ALL_PROXY", "http_proxy", "HTTPS_PROXY"), "socks5h://127.0.0.1:9")
    env = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SERVES_AN_EMPTY_PAGE, str(free_port()), str(tmp_path / "out")],
        env=env | socks | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (uploaded,) = (line for line in done.stdout.splitlines() if "a.png" in line)
    assert uploaded.startswith(f'["{tmp_path}/megaflux-panel-') and uploaded.endswith("socks5h://127.0.0.1:9")
    assert [file.name for file in tmp_path.iterdir()] == ["gradio"]  # and nothing stays


def test_a_temporary_folder_of_the_users_is_used_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "own"))
    give_gradio_a_folder()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "own") and (tmp_path / "own").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"^GRADIO_TEMP_DIR {tmp_path}/file: no file can be written there .File exists"):
        give_gradio_a_folder()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# With a loaded run


@pytest.fixture(scope="module")
def loaded(run_folder, controlnet_folder):  # noqa: F811
    return load(Runtime(checkpoint=str(run_folder), controlnet={"": str(controlnet_folder)}, device="cpu"))


class Desk:
    """The handlers of a page, and the page's values as a person would set them."""

    def __init__(self, loaded, out: Path):
        from megaflux.panel.handlers import VALUES
        from megaflux.panel.wiring import build, guarded
        from megaflux.panel.work import Work

        self.page = build(Work(loaded, out))
        self.h = self.page.handlers
        self.names = {component: name for name, component in self.h.c.items() if name not in ("controls", "map_files")}
        self.order, self.guarded = VALUES, guarded
        self.session, self.shown = Session(), {}
        self.values = vars(Form(steps=2, count=2)) | {"mask_by": "discs"}
        self.ticks = {"canny": 0.5}

    def __call__(self, handler, *first, last: bool = True) -> dict:
        """Call a handler as the page does; {component's name: value}."""
        values = [self.values[name] for name in self.order]
        for kind, _, _ in self.h.c["controls"]:
            values += [kind in self.ticks, self.ticks.get(kind, 0.5)]
        changes = self.guarded(self.h, handler)(*first, *([self.session, *values] if last else []))
        changed = {self.names[c]: value for c, value in changes.items() if c in self.names}
        self.session = changed.get("session", self.session)
        self.shown |= changed
        return changed

    def give(self, image: Image.Image, path: Path) -> dict:
        image.save(path)
        return self(self.h.give_reference, str(path))

    def click(self, x: int, y: int) -> dict:
        event = SimpleNamespace(index=[x, y])
        return self(lambda session, *values: self.h.click(event, session, 0.3, 2.0, *values))

    def generate(self) -> dict:
        self(self.h.arm, REQUEST, last=False)
        self.progress = []
        return self(self.h.generate, REQUEST, lambda step, **_: self.progress.append(step))


@pytest.mark.parametrize("source", [{}, {"ema": True}])
def test_the_title_says_that_weights_are_averaged(loaded, tmp_path, monkeypatch, source):
    monkeypatch.setattr(loaded.pipeline, "source", source)
    page = Desk(loaded, tmp_path / "out").page
    (title,) = [block.value for block in page.blocks.values() if getattr(block, "elem_id", None) == "title"]
    assert ("averaged weights" in title) == bool(source)
    page.close()


@pytest.fixture
def desk(loaded, tmp_path):
    desk = Desk(loaded, tmp_path / "out")
    yield desk
    desk.page.stop_all()


def heat(changes: dict) -> np.ndarray:
    return np.asarray(changes["grid"]["value"])


def test_the_heat_map_follows_every_act_without_the_model(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(type(desk.h.work.loaded.pipeline), "__call__", None)
    plain = heat(desk.give(picture(168, 112, 1), tmp_path / "cat.png"))
    assert plain.shape == (341, 512, 3) and "cat.png: 2 rows × 2 columns of tokens" in desk.shown["grid_line"]["value"]
    dotted = heat(desk.click(100, 100))
    assert (dotted != plain).any() and desk.shown["table"] == [[0.1963, 0.2947, 0.3, 2.0]]
    weaker = heat(desk(desk.h.slide("weight"), 0.0))
    assert (weaker != dotted).any()
    desk.values["background"] = 0.2
    assert (heat(desk(desk.h.show_reference)) != weaker).any()
    desk.values |= {"background": 0.0}
    assert "its dots leave no token" in desk(desk.h.show_reference)["grid_line"]["value"]
    desk.values |= {"background": 1.0, "downsample": 2}
    assert "1 rows × 1 columns" in desk(desk.h.show_reference)["grid_line"]["value"]
    desk.values |= {"downsample": 1}
    assert (heat(desk(desk.h.act(state.cleared))) == plain).all()
    assert (heat(desk(desk.h.act(state.undone))) == weaker).all()
    beyond = desk(lambda *a: desk.h.edit([[0.5, 0.5, 1.5, 9]], a[0], 0.3, 2.0, *a[1:]))
    assert desk.session.dots[0].weight == 9 and (beyond["weight"], beyond["radius"]) == (4, 1)
    desk(desk.h.slide("radius"), 0.5)
    assert (desk.session.dots[0].weight, desk.session.dots[0].radius) == (9, 0.5)


def test_the_grid_and_the_weights_are_those_of_the_run(desk, tmp_path):
    from megaflux.generation.run import read_inputs, run

    for size in ((168, 112), (40, 90), (300, 300), (3, 2)):
        desk.give(picture(*size, 1), tmp_path / f"{size[0]}.png")
        desk.click(100, 100)
        desk.values |= {"variety": 0.3, "preserve_mass": True, "background": 0.5, "seed": 5}
        form = desk.h.form([desk.values[name] for name in desk.order])
        result = run(desk.h.work.loaded.pipeline, *read_inputs(job_of(desk.session, form)))
        assert np.array_equal(
            result.output.weights[0][0], desk.h.work.weights(desk.session.reference, desk.session.dots, form)
        )


def test_beside_a_prompt_t5_leaves_the_picture_fewer_tokens(with_t5, converted, tmp_path):  # noqa: F811
    from megaflux.generation.control.detectors import Detectors, Sources
    from megaflux.generation.run import read_inputs, run
    from megaflux.panel.work import Work

    picture(300, 300, 1).save(tmp_path / "cat.png")
    work = Work(Loaded(with_t5, Detectors(Sources()), Runtime(checkpoint=str(converted))), tmp_path)
    session = Session(reference=store(tmp_path / "cat.png", tmp_path))
    session = state.clicked(session, 0.3, 0.4, 0.3, 3.0)
    grids = set()
    for prompt in ("", "a fox"):
        form = Form(prompt=prompt, steps=1, count=1, text_encoder="t5")
        job = job_of(session, form).model_copy(update={"width": 64, "height": 64})
        result = run(with_t5, *read_inputs(job))
        assert np.array_equal(result.output.weights[0][0], work.weights(session.reference, session.dots, form))
        grids.add(work.grid(session.reference, form))
    assert len(grids) == 2


def test_pictures_replay_and_settings_are_the_pictures_own(desk, tmp_path):
    desk.give(picture(168, 112, 1), tmp_path / "cat.png")
    desk.click(100, 100)
    desk.values |= {"seed": 5, "attention_map": True, "variety": 0.2, "cfg": 2.5, "negative": "rain"}
    made = desk.generate()
    assert made["status"].startswith('<div class="line good">2 pictures of 64 × 64 px'), made
    files = [Path(file) for file, _ in made["gallery"]["value"]]
    assert [c for _, c in made["gallery"]["value"]] == ["seed 5", "seed 6"] and len(set(files)) == 2
    assert [file.name for file in files] == ["cat-seed5.png", "cat-seed6.png"] and desk.progress[-1] == (4, 4)
    assert [c.split(":")[0] for _, c in made["attention"]["value"]] == ["seed 5", "seed 6"]
    (tmp_path / "cat.png").unlink()  # the upload is gone, as Gradio's temporary folder is
    for index, file in enumerate(files):
        chosen = desk(lambda *_, index=index: desk.h.choose(SimpleNamespace(index=index), made["made"]), last=False)
        settings = json.loads(Path(chosen["settings"]["value"]).read_text())
        assert settings == json.loads(Image.open(file).text["megaflux"]) and settings["seed"] == 5 + index
        assert (settings["job"]["cfg"], settings["job"]["negative"]) == (2.5, "rain")
        assert infer.main(["--from-image", str(file), "--out", str(tmp_path / "again")]) == 0
        assert Image.open(tmp_path / "again" / file.name).tobytes() == Image.open(file).tobytes()
    used = desk(lambda *a: desk.h.use(made["made"], 1, *a))
    assert (
        desk.session.reference.file == str(files[1])
        and desk.session.dots == ()
        and "cat-seed6" in used["grid_line"]["value"]
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_from_the_page(desk, tmp_path, mode):
    desk.values |= {"mode": mode, "prompt": "a fox", "count": 1}
    laid = desk(desk.h.show_parts)
    uses = state.parts_used(mode)
    for part, name in (("reference_part", "reference"), ("start_part", "start"), ("control_part", "control")):
        assert laid[part]["visible"] == uses[name]
    if mode != "text":
        desk.give(picture(96, 64, 1), tmp_path / "cat.png")
    if uses["mask"]:
        desk(lambda *a: desk.h.mask_at(SimpleNamespace(index=[256, 170]), 0.3, *a))
        assert len(desk.session.discs) == 1
    made = desk.generate()
    assert "good" in made["status"], made["status"]
    job = json.loads(Image.open(made["gallery"]["value"][0][0]).text["megaflux"])["job"]
    assert job["mode"] == mode and bool(job["mask"]) == uses["mask"]
    if uses["mask"]:
        mask = Image.open(job["mask"]["file"])
        assert mask.size == (96, 64) and mask.getpixel((48, 32)) == 255 and mask.getpixel((2, 2)) == 0


def test_start_image_and_mask_by_file(desk, tmp_path):
    desk.values |= {"mode": "inpaint", "mask_by": "file", "count": 1}
    mask = Image.new("L", (64, 48))
    ImageDraw.Draw(mask).rectangle([16, 16, 47, 31], fill=255)
    for name, image in (("room", picture(64, 48, 3)), ("mask", mask), ("small", Image.new("L", (32, 32), 255))):
        image.save(tmp_path / f"{name}.png")
    shown = desk(desk.h.give_start, str(tmp_path / "room.png"))
    assert shown["begin"]["visible"] and "Start image: room.png" in shown["status"]
    resized = desk(desk.h.give_mask, str(tmp_path / "small.png"))
    assert "small.png, resized to the start image" in resized["status"] and desk.session.mask is not None
    red = np.asarray(desk(desk.h.give_mask, str(tmp_path / "mask.png"))["begin"]["value"])
    assert (red != np.asarray(shown["begin"]["value"])).any()
    assert "good" in desk.generate()["status"]
    desk(desk.h.drop_start)
    assert "needs a picture to begin with" in desk.generate()["status"]


def test_ready_maps_and_a_panel_without_controlnet(desk, loaded, tmp_path):
    desk.values |= {"mode": "controlnet", "count": 1}
    desk.ticks = {"depth": 0.4}
    desk.give(picture(96, 64, 1), tmp_path / "cat.png")
    assert "needs a depth detector; give --depth-model DIR" in desk.generate()["status"]
    desk(lambda *a: desk.h.give_map("depth")(str(tmp_path / "cat.png"), *a))
    assert "good" in desk.generate()["status"]
    net, desk.h.work.loaded.pipeline.controlnet = desk.h.work.loaded.pipeline.controlnet, None
    try:
        assert "needs a ControlNet; start the panel with --controlnet DIR" in desk.generate()["status"]
    finally:
        desk.h.work.loaded.pipeline.controlnet = net


def test_trouble_is_a_line_and_the_next_press_works(desk, tmp_path, monkeypatch, capsys):
    assert "mode variation needs a reference" in desk.generate()["status"]
    for file, said in bad_files.write(tmp_path).items():
        changes = desk(desk.h.give_reference, str(file))
        assert said in changes["status"] and "trouble" in changes["status"] and changes["reference_file"] is None
        assert desk.session.reference is None
    desk.give(picture(96, 64, 1), tmp_path / "cat.png")
    with monkeypatch.context() as patch:
        patch.setattr("megaflux.panel.work.write", lambda *_: 1 / 0)
        assert "failed: ZeroDivisionError: division by zero (more in the terminal)" in desk.generate()["status"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    Path(desk.session.reference.file).write_bytes(b"gone bad")
    assert "has changed since" in desk.generate()["status"]
    desk.give(picture(96, 64, 1), tmp_path / "cat.png")  # written anew
    assert "good" in desk.generate()["status"]


def test_names_are_escaped(desk, tmp_path):
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_bytes(b"")
    said = desk(desk.h.give_reference, str(tmp_path / "<img src=x onerror=alert(1)>.png"))["status"]
    assert "<img" not in said and "&lt;img" in said


def test_stop_ends_a_run_after_a_step_and_saves_nothing(desk, tmp_path):
    desk.give(picture(96, 64, 1), tmp_path / "cat.png")
    desk.values["steps"] = 500
    assert "Nothing is running" in desk(desk.h.stopping, REQUEST, last=False)["status"]
    desk(desk.h.arm, REQUEST, last=False)
    steps = []

    def bar(step, **_):
        steps.append(step)
        if len(steps) == 3:
            assert "Stopping" in desk(desk.h.stopping, REQUEST, last=False)["status"]
            desk.h.stop(REQUEST)

    assert "Stopped; nothing was saved" in desk(desk.h.generate, REQUEST, bar)["status"]
    assert steps[-1] == (2, 1000) and not list((tmp_path / "out").glob("*.png"))
    desk(desk.h.arm, REQUEST, last=False)
    desk.h.stop(REQUEST)  # while it waits for its turn
    assert "Stopped" in desk(desk.h.generate, REQUEST, bar)["status"]
    assert desk.h.stops == {}
