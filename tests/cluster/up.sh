#!/bin/bash
# up.sh: single-node Kubernetes 1.37 in network, mount and PID namespaces of its own, with no route out. Nothing VM-wide is changed:
# no sysctl, no iptables rule, no mount, no process is left once the init process (pid file `init`) is killed.
#   DIR: holds img/*.tar (images.sh), cd/ (containerd's store, kept between runs), run/ (this cluster's state); BIN: build.sh's binaries
#   NAME: the network namespace and cgroup name; two clusters with two NAMEs and DIRs can run beside each other
# Started by scripts/cluster.
set -euo pipefail
: "${DIR:?}" "${BIN:?}" "${NAME:?}"; R=$DIR/run; C=$DIR/cd
NODE=node1; NODEIP=10.94.0.1; SVC=10.93.0.0/24; SVC1=10.93.0.1; DNS=10.93.0.10; PODS=10.92.0.0/24
S=$(cd "$(dirname "$0")" && pwd); t0=$(date +%s.%N); lap() { printf '%6.1f s  %s\n' "$(echo "$(date +%s.%N)-$t0" | bc)" "$*"; }
[ -f $R/pid/init ] && kill -0 "$(cat $R/pid/init)" 2>/dev/null && { echo "already up"; exit 0; }
mkdir -p $R/{pki,log,pid,kubelet,cni,sysctl,conf,hostpath_pv} $C/{root,state,net.d}

# 1. Namespaces. The init process reaps orphans; when it dies the kernel kills every process of the cluster, pods included.
[ -e /run/netns/$NAME ] || ip netns add $NAME
setsid nohup nsenter --net=/run/netns/$NAME unshare --mount --propagation slave --pid --fork --kill-child --mount-proc $BIN/pause >/dev/null 2>&1 &
echo $! > $R/pid/init
for i in $(seq 50); do INIT=$(pgrep -P $! || true); [ -n "$INIT" ] && [ "$(readlink /proc/$INIT/exe)" = "$(readlink -f $BIN/pause)" ] && break; sleep 0.1; done
echo $INIT > $R/pid/init1
in_ns() { nsenter -t $INIT --net --mount --pid -- "$@"; }
in_ns bash -euc "
  mount --make-rshared /
  mkdir -p /var/lib/kubelet /var/lib/cni /run/containerd /run/netns /tmp/hostpath_pv; mount --bind $R/hostpath_pv /tmp/hostpath_pv
  mount --bind $R/kubelet /var/lib/kubelet; mount --bind $R/cni /var/lib/cni          # kubelet's device-plugin folder is not configurable
  mount -t tmpfs tmpfs /run/containerd; mount -t tmpfs tmpfs /run/netns               # shim sockets, pods' network namespaces
  for kv in vm/overcommit_memory=0 vm/panic_on_oom=0 kernel/panic=1 kernel/panic_on_oops=0 kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    f=$R/sysctl/\$(basename \${kv%=*}); echo \${kv#*=} > \$f; mount --bind \$f /proc/sys/\${kv%=*}   # what the kubelet would set for the whole VM
  done
  ip link set lo up; ip link show br-node >/dev/null 2>&1 || { ip link add br-node type bridge; ip addr add $NODEIP/24 dev br-node; ip link set br-node up; ip route add default dev br-node; }
  sysctl -qw net.ipv4.ip_forward=1"
for c in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do
  g=/sys/fs/cgroup/$c; mkdir -p $g/$NAME; [ $c = cpuset ] && { cat $g/cpuset.cpus > $g/$NAME/cpuset.cpus; cat $g/cpuset.mems > $g/$NAME/cpuset.mems; }; done; true
start() { local n=$1; shift; setsid nohup nsenter -t $INIT --net --mount --pid -- "$@" > $R/log/$n.log 2>&1 & echo $! > $R/pid/$n; }

# 2. Certificates and kubeconfigs
cd $R/pki
if [ ! -f ca.crt ]; then
  openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 30 -subj /CN=kube-ca 2>/dev/null
  mk() { openssl req -newkey rsa:2048 -nodes -keyout $1.key -out $1.csr -subj "$2" 2>/dev/null
    printf 'subjectAltName=%s\nextendedKeyUsage=clientAuth,serverAuth\n' "$3" > $1.ext
    openssl x509 -req -in $1.csr -CA ca.crt -CAkey ca.key -set_serial 0x$(openssl rand -hex 8) -days 30 -extfile $1.ext -out $1.crt 2>/dev/null; }
  mk apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:$SVC1,IP:$NODEIP" &
  mk admin /O=system:masters/CN=admin DNS:admin &
  mk kcm /CN=system:kube-controller-manager DNS:kcm &
  mk sched /CN=system:kube-scheduler DNS:sched &
  mk proxy /CN=system:kube-proxy DNS:proxy &
  mk node "/O=system:nodes/CN=system:node:$NODE" "DNS:$NODE,IP:$NODEIP,IP:127.0.0.1" &
  openssl genrsa -out sa.key 2048 2>/dev/null; openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
  wait %2 %3 %4 %5 %6 %7 2>/dev/null || true; for u in apiserver admin kcm sched proxy node; do for i in $(seq 50); do [ -s $u.crt ] && break; sleep 0.1; done; done
  for u in admin kcm sched proxy node; do cat > $R/conf/$u.conf <<K
apiVersion: v1
kind: Config
clusters: [{name: k, cluster: {server: "https://127.0.0.1:6443", certificate-authority: $R/pki/ca.crt}}]
users: [{name: u, user: {client-certificate: $R/pki/$u.crt, client-key: $R/pki/$u.key}}]
contexts: [{name: c, context: {cluster: k, user: u}}]
current-context: c
K
  done
fi
lap namespaces, certificates

# 3. etcd, API server, containerd
start etcd ${ETCD:-$BIN/kube etcd} --name e --data-dir $R/etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster e=http://127.0.0.1:2380 --unsafe-no-fsync
start apiserver $BIN/kube kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --advertise-address=$NODEIP --secure-port=6443 \
  --service-cluster-ip-range=$SVC --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
  --client-ca-file=$R/pki/ca.crt --tls-cert-file=$R/pki/apiserver.crt --tls-private-key-file=$R/pki/apiserver.key \
  --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority=$R/pki/ca.crt --kubelet-client-certificate=$R/pki/admin.crt --kubelet-client-key=$R/pki/admin.key \
  --service-account-key-file=$R/pki/sa.pub --service-account-signing-key-file=$R/pki/sa.key --service-account-issuer=https://kubernetes.default.svc --cert-dir=$R/run
sed "s#@C@#$C#g; s#@NAME@#$NAME#g" $S/containerd2.toml > $R/conf/containerd.toml
sed "s#@PODS@#$PODS#g" $S/10-ptp.conflist > $C/net.d/10-ptp.conflist
start containerd env PATH=$BIN:$PATH $BIN/containerd --config $R/conf/containerd.toml
export KUBECONFIG=$R/conf/admin.conf; k() { in_ns $BIN/kubectl "$@"; }
for i in $(seq 300); do k get --raw=/readyz >/dev/null 2>&1 && break; sleep 0.2; done; k get --raw=/readyz >/dev/null; lap API server ready
for i in $(seq 50); do in_ns $BIN/ctr -a $C/containerd.sock version >/dev/null 2>&1 && break; sleep 0.2; done
for f in $DIR/img/*.tar; do    # only what is not there yet
  m=$C/root/imported.$(basename $f); [ $m -nt $f ] && continue
  in_ns ${CTR:-$BIN/ctr} -a $C/containerd.sock -n k8s.io images import $f > $R/log/import.log 2>&1 || { cat $R/log/import.log; exit 1; }
  touch $m; lap image $(basename $f); done

# 4. The rest
start kcm $BIN/kube kube-controller-manager --kubeconfig=$R/conf/kcm.conf --bind-address=127.0.0.1 --service-account-private-key-file=$R/pki/sa.key --root-ca-file=$R/pki/ca.crt \
  --cluster-signing-cert-file=$R/pki/ca.crt --cluster-signing-key-file=$R/pki/ca.key --use-service-account-credentials=true --leader-elect=false --cluster-name=k --enable-hostpath-provisioner=true --cert-dir=$R/run
start sched $BIN/kube kube-scheduler --kubeconfig=$R/conf/sched.conf --bind-address=127.0.0.1 --leader-elect=false --cert-dir=$R/run
# its host-path provisioner makes 0750 root folders, which no non-root pod can use, and hostPath volumes know no fsGroup
start pvperm sh -c "while sleep 0.2; do chmod 0777 $R/hostpath_pv/* 2>/dev/null; done"
cat > $R/conf/kubelet.yaml <<K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$NAME
containerRuntimeEndpoint: unix://$C/containerd.sock
failSwapOn: false
oomScoreAdj: 0
clusterDNS: [$DNS]
clusterDomain: cluster.local
resolvConf: $R/conf/resolv.conf
readOnlyPort: 0
tlsCertFile: $R/pki/node.crt
tlsPrivateKeyFile: $R/pki/node.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $R/pki/ca.crt}}
authorization: {mode: Webhook}
maxOpenFiles: 20000
nodeStatusUpdateFrequency: 5s
volumeStatsAggPeriod: 10s
evictionHard: {memory.available: 100Mi, nodefs.available: 2%, imagefs.available: 2%}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
K
echo "nameserver 127.0.0.1" > $R/conf/resolv.conf
start kubelet $BIN/kube kubelet --config=$R/conf/kubelet.yaml --kubeconfig=$R/conf/node.conf --hostname-override=$NODE --node-ip=$NODEIP --cert-dir=$R/run --runtime-cgroups=/ --v=2
start kproxy $BIN/kube kube-proxy --kubeconfig=$R/conf/proxy.conf --hostname-override=$NODE --cluster-cidr=$PODS --proxy-mode=${PROXY:-iptables} --conntrack-max-per-core=0 \
  --bind-address=$NODEIP --healthz-bind-address=127.0.0.1:10256 --metrics-bind-address=127.0.0.1:10249 --oom-score-adj=0
for i in $(seq 300); do k get node $NODE >/dev/null 2>&1 && break; sleep 0.2; done
k wait --for=condition=Ready node/$NODE --timeout=120s >/dev/null; lap node Ready
start npc $BIN/npc --kubeconfig=$R/conf/admin.conf --hostname-override=$NODE --service-cluster-ip-range=$SVC
sed "s#@DNS@#$DNS#g" $S/coredns.yaml | k apply -f - >/dev/null
k -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null; lap CoreDNS ready
 