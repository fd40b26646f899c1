"""Requirements against what is installed."""

from importlib import metadata

from multilora.cli.doctor.packages import InstalledPackage, installed_packages


def test_core_extras_and_versions():
    found = installed_packages(
        [
            "torch>=2",
            "no-such-package-here>=1",
            'pytest>=100000; extra == "gpu"',
            'tqdm; sys_platform == "nowhere"',
            'ruff; extra == "dev"',
        ]
    )
    assert [(p.name, p.fits) for p in found.core] == [("torch", True), ("no-such-package-here", False)]
    assert found.core[0].version == metadata.version("torch")
    assert found.core[1].version is None
    assert list(found.extras) == ["gpu"]
    assert found.extras["gpu"] == [InstalledPackage("pytest", ">=100000", metadata.version("pytest"))]
    assert not found.extras["gpu"][0].fits


def test_the_package_s_own_list():
    found = installed_packages()
    assert found.listed and {"torch", "transformers"} <= {p.name for p in found.core}
    assert {"gpu", "gguf", "otel"} <= found.extras.keys()
    assert not {"dev", "browser"} & found.extras.keys()


def test_from_source_without_metadata(monkeypatch):
    monkeypatch.setattr("multilora.cli.doctor.packages.NAME", "no-such-package-here")
    assert not installed_packages().listed


def test_a_local_version_fits():
    assert InstalledPackage("torch", ">=2.11", "2.13.0+cpu").fits
    assert InstalledPackage("torch", "", "2.13.0.dev1").fits
    assert not InstalledPackage("torch", ">=2.14", "2.13.0").fits
