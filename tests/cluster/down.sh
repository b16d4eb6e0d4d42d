#!/bin/bash
# down.sh: ends only what up.sh started. KEEP=1 keeps etcd and the kubelet's state, so the next up.sh is a reboot of the same cluster.
: "${DIR:?}" "${BIN:?}" "${NAME:?}"; R=$DIR/run; C=$DIR/cd
P=$(cat $R/pid/init 2>/dev/null); I=$(cat $R/pid/init1 2>/dev/null)
if [ -n "$P" ] && [ "$(readlink /proc/$P/exe)" = /usr/bin/unshare ]; then
  if [ -z "${KEEP:-}" ]; then    # empty containerd's store of containers, keep its images
    for n in kubelet kcm; do [ -s $R/pid/$n ] && c=$(pgrep -P $(cat $R/pid/$n)) && kill $c; done; sleep 0.5
    c() { nsenter -t $I --net --mount --pid -- $BIN/ctr -a $C/containerd.sock -n k8s.io "$@"; }
    c tasks ls -q 2>/dev/null | xargs -r -n1 nsenter -t $I --net --mount --pid -- $BIN/ctr -a $C/containerd.sock -n k8s.io tasks rm -f >/dev/null 2>&1
    c containers ls -q 2>/dev/null | xargs -r nsenter -t $I --net --mount --pid -- $BIN/ctr -a $C/containerd.sock -n k8s.io containers rm 2>/dev/null
    c sandboxes ls 2>/dev/null | awk 'NR>1{print $1}' | xargs -r nsenter -t $I --net --mount --pid -- $BIN/ctr -a $C/containerd.sock -n k8s.io sandboxes rm -f >/dev/null 2>&1
  fi
  kill -9 $P; for i in $(seq 100); do [ -e /proc/$I ] || break; sleep 0.1; done    # --kill-child: init dies with it, and with init the whole PID namespace
fi
ip netns del $NAME 2>/dev/null
for i in 1 2 3 4 5; do n=0; for g in /sys/fs/cgroup/*/$NAME; do [ -d $g ] && { find $g -depth -type d -exec rmdir {} + 2>/dev/null; n=1; }; done; [ $n = 0 ] && break; sleep 0.3; done
rm -rf $R/pid $C/state; [ -n "${KEEP:-}" ] || rm -rf $R
rmdir /tmp/hostpath_pv /var/lib/cni /var/lib/kubelet 2>/dev/null; true    # empty mount points, if no other cluster uses them
