#!/bin/bash
# build.sh: every binary of the cluster from Go modules, with the ordinary go command, into $BIN. Needs Go 1.26.6 or newer.
set -euo pipefail
: "${DIR:?}" "${BIN:?}"; S=$(cd "$(dirname "$0")" && pwd); B=$BIN.part; mkdir -p $B
export GOFLAGS=-buildvcs=false CGO_ENABLED=0 GOCACHE=${GOCACHE:-$DIR/gocache}
t() { local s=$(date +%s); "$@"; echo "$(( $(date +%s)-s )) s: ${*: -1}"; }
V=1.37.2; LD="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do LD="$LD -X $p.gitVersion=v$V -X $p.gitMajor=1 -X $p.gitMinor=37 -X $p.gitTreeState=archive -X $p.buildDate=2026-11-01T00:00:00Z"; done
cd $S/mod/kube
t nice -n 10 go build -trimpath -ldflags "$LD" -o $B/kube ./kube        # API server, controllers, scheduler, kubelet, kube-proxy, kubectl, etcd
t nice -n 10 go build -trimpath -ldflags "-s -w" -o $B/npc ./npc        # NetworkPolicy enforcer
t nice -n 10 go build -trimpath -ldflags "-s -w" -o $B/coredns ./dns
cd $S/mod/containerd; P=github.com/containerd/containerd/v2
t nice -n 10 go build -tags no_btrfs,no_zfs,no_devmapper,no_tracing -trimpath -ldflags "-s -w -X $P/version.Version=v2.4.2" -o $B/ $P/cmd/ctr $P/cmd/containerd-shim-runc-v2 $P/cmd/containerd
gcc -Os -static -s -o $B/pause $S/pause.c
mv $B $BIN # whole, or not at all
