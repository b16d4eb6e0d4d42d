#!/bin/bash
# images.sh: the images that every cluster needs, from what is on the machine (busybox-static, build.sh's binaries), into $DIR/img
set -euo pipefail
: "${DIR:?}" "${BIN:?}"; S=$(cd "$(dirname "$0")" && pwd); I=$DIR/img; T=$(mktemp -d); mkdir -p $I
mkdir -p $T/pause $T/dns/etc $T/bb/{bin,etc,tmp}; chmod 1777 $T/bb/tmp
cp $BIN/pause $T/pause/; cp $BIN/coredns $T/dns/
cp "$(command -v busybox)" $T/bb/bin/busybox; for a in $(busybox --list); do [ -e $T/bb/bin/$a ] || ln -s busybox $T/bb/bin/$a; done
printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' > $T/bb/etc/passwd
python3 $S/mkimage.py $I/pause.tar registry.k8s.io/pause:3.10.2 $T/pause 'entrypoint=["/pause"]' user=65535:65535
python3 $S/mkimage.py $I/bb.tar docker.io/library/busybox:1 $T/bb 'cmd=["sh"]'
python3 $S/mkimage.py $I/coredns.tar docker.io/library/coredns:1 $T/dns 'entrypoint=["/coredns"]'
rm -rf $T
