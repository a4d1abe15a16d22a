"""`python -m megaflux.bench loader` and `infer`: rows by name, from what they make and from what they are given."""

from megaflux.bench.__main__ import main
from tests.bench.runs import bench, metrics, read


def test_loader_measures_each_number_of_workers(tmp_path):
    file = tmp_path / "r.json"
    done = bench(
        "loader",
        "--images",
        "18",
        "--side",
        "64",
        "--workers",
        "0,1",
        "--micro-batch",
        "2",
        "--samples",
        "3",
        "--busy-ms",
        "1",
        "--json",
        str(file),
    )
    assert done.returncode == 0, done.stderr
    found = metrics(read(file), "loader")
    assert [arm for arm, _ in found] == ["workers-0", "workers-1"]
    assert all(set(values) == {"samples_per_s", "wait_ms", "wait_fraction"} for values in found.values())


def test_infer_measures_three_arms_of_a_run(tmp_path, run_folder, capsys):
    file = tmp_path / "r.json"
    command = ["infer", "--checkpoint", str(run_folder), "--steps", "2", "--samples", "2", "--json", str(file)]
    assert main(command) == 0
    found = metrics(read(file), "infer")
    assert sorted(arm for arm, _ in found) == ["diffusers", "ours", "ours-kernels-off"]
    assert all({"image_s", "image_s_p10", "image_s_p90"} <= set(values) for values in found.values())


def test_infer_measures_by_mode(tmp_path):
    file = tmp_path / "r.json"
    command = [
        "infer",
        "--steps",
        "1",
        "--samples",
        "1",
        "--side",
        "32",
        "--arms",
        "diffusers,ours",
        "--modes",
        "img2img,controlnet-inpaint",
        "--json",
        str(file),
    ]
    assert main(command) == 0
    found = metrics(read(file), "infer")
    assert {(arm, shape.split()[0]) for arm, shape in found} == {
        (arm, mode) for arm in ("diffusers", "ours") for mode in ("img2img", "controlnet-inpaint")
    }
    assert all(values["rss_growth_bytes"] >= 0 for values in found.values())


def test_infer_makes_random_tiny_weights(tmp_path):
    file = tmp_path / "r.json"
    command = ["infer", "--steps", "1", "--samples", "1", "--side", "64", "--arms", "ours", "--json", str(file)]
    assert main(command) == 0
    assert [arm for arm, _ in metrics(read(file), "infer")] == ["ours"]
