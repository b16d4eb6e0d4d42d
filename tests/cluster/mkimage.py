#!/usr/bin/env python3
"""mkimage.py OUT.tar NAME:TAG SRC [KEY=VALUE...]: write a one-layer image archive for `ctr images import`, with no builder.

SRC is a root file system's tar or a folder. KEY=VALUE: entrypoint, cmd (a JSON list or one word), user, env (repeatable).
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path


def root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    return member


def main(out: Path, name: str, source: Path, *options: str) -> None:
    config: dict[str, object] = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
    for key, _, value in (option.partition("=") for option in options):
        if key == "env":
            config["Env"] = [*config["Env"], value]
        elif key == "user":
            config["User"] = value
        else:
            config[key.capitalize()] = json.loads(value) if value.startswith("[") else [value]
    layer = source
    if source.is_dir():
        layer = out.with_suffix(".layer")
        with tarfile.open(layer, "w") as archive:
            for entry in sorted(source.iterdir()):
                archive.add(entry, entry.name, filter=root)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "architecture": "amd64", "os": "linux", "config": config, "history": [{"created_by": "mkimage"}],
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }  # fmt: skip
    image = json.dumps(about).encode()
    config_name = hashlib.sha256(image).hexdigest() + ".json"
    with tarfile.open(out, "w") as archive:
        for path, data in ((config_name, image), ("manifest.json", json.dumps(
            [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]).encode())):  # fmt: skip
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.add(layer, "layer.tar")
    if layer != source:
        layer.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
