#!/bin/bash
# The life of one pretended instance, as the first process of namespaces of its own:
#
#   unshare --mount --pid --net --uts --fork --kill-child bash instance.sh FOLDER IMAGE NAME IP GATEWAY
#
# Its file system is this machine's under a layer in memory, so nothing that SkyPilot or a task does
# to it reaches the host; /root is the baked image's. It says "up", waits for its cable, starts what
# vast.ai calls onstart and becomes an sshd. When that ends, the kernel ends everything in it.
set -eu
FOLDER=$1 IMAGE=$2 NAME=$3 IP=$4 GATEWAY=$5
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
hostname "$NAME"
echo up
read -r _

ip link set lo up
ip address add "$IP" peer "$GATEWAY" dev eth0
ip link set eth0 up
for probed in 8.8.8.8 1.1.1.1; do ip route add "$probed" via "$GATEWAY"; done  # Ray asks for them

mount --make-rprivate /
LAYERS=$FOLDER/layers ROOT=$FOLDER/layers/root
mkdir -p "$LAYERS"
mount -t tmpfs -o size=8g tmpfs "$LAYERS"
mkdir "$LAYERS"/{upper,work,home-upper,home-work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$LAYERS/upper,workdir=$LAYERS/work" "$ROOT"
mount -t overlay overlay \
  -o "lowerdir=$IMAGE/root,upperdir=$LAYERS/home-upper,workdir=$LAYERS/home-work" "$ROOT/root"
for hidden in home tmp var/tmp run; do
  mkdir -p "$ROOT/$hidden"
  mount -t tmpfs tmpfs "$ROOT/$hidden"
done
chmod 1777 "$ROOT/tmp" "$ROOT/var/tmp"
mkdir -p "$ROOT/opt/wheelhouse" "$ROOT/run/sshd"
mount --bind -o ro "$IMAGE/wheels" "$ROOT/opt/wheelhouse"
mount -t proc proc "$ROOT/proc"
mount -t sysfs -o ro sysfs "$ROOT/sys"
mount --rbind /dev "$ROOT/dev"
mkdir -p "$ROOT/dev/shm"
mount -t tmpfs tmpfs "$ROOT/dev/shm"

printf '[global]\nno-index = true\nfind-links = /opt/wheelhouse\n' > "$ROOT/etc/pip.conf"
printf 'nameserver 127.0.0.1\n' > "$FOLDER/resolv.conf"  # refuses at once: nothing has a name here
mount --bind "$FOLDER/resolv.conf" "$(readlink -m "$ROOT/etc/resolv.conf")" 2>/dev/null ||
  cp --remove-destination "$FOLDER/resolv.conf" "$ROOT/etc/resolv.conf"
printf '127.0.0.1 localhost\n%s %s\n' "$IP" "$NAME" > "$ROOT/etc/hosts"
install -m 755 "$FOLDER/nvidia-smi" "$ROOT/usr/local/bin/nvidia-smi"
rm -rf "$ROOT/root/.ssh"
install -d -m 700 -o 0 -g 0 "$ROOT/root/.ssh"
chown 0:0 "$ROOT/root"
cp "$FOLDER/onstart.sh" "$FOLDER/sshd_config" "$ROOT/run/"
ssh-keygen -q -t ed25519 -N '' -f "$ROOT/run/host_key"

# Nothing inherited: an instance sees the environment of a login, and no host's locked root.
exec env -i HOME=/root USER=root PATH="$PATH" LANG=C.UTF-8 chroot "$ROOT" /bin/bash -c '
cd /root
usermod -p "*" root
bash /run/onstart.sh
exec /usr/sbin/sshd -D -e -f /run/sshd_config'
