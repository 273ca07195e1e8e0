#!/usr/bin/env bash
# The network of real guests: two on one wire, each with an IPv4 and an IPv6 address, what the
# kernel made of their configurations, what a neighbour can do to them (threat T8), names on a
# root that cannot be written. A machine without a NIC is what every other script boots.
. "$(dirname "$0")/lib.sh"

GUEST_MEMORY=256M

# nic MAC ROLE: one end of the wire between the two; the server's is made first.
nic() {
    echo "-netdev stream,id=net,server=$2,addr.type=unix,addr.path=$T/wire
        -device virtio-net-pci,netdev=net,romfile=,mac=52:54:00:00:00:$1"
}

# Puts the guest that runs aside, so that the next boot does not end it: aside NAME.
declare -A SOCKS PIDS
aside() {
    SOCKS[$1]=$SOCK PIDS[$1]="$GUEST_QEMU_PID $GUEST_VSOCK_PID $HTTP_PID"
    GUEST_QEMU_PID='' GUEST_VSOCK_PID='' HTTP_PID=''
}

# on NAME COMMAND…: as that guest's host.
on() {
    local SOCK=${SOCKS[$1]}
    shift
    "$@"
}

# in_python NAME CODE: in that guest.
in_python() { on "$1" shell "echo $(base64 -w 0 <<<"$2") | base64 -d | python3 - 2>&1"; }

# Local addresses, in the kernel's hexadecimal, that sockets of a guest are bound to, but for
# loopback: port 7000 is the program's own.
listeners() {
    on "$1" shell 'cat /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6 /proc/net/raw /proc/net/raw6' |
        awk '$2 ~ /^[0-9A-F]+:[0-9A-F]{4}$/ && $2 !~ /^0100007F:|^0{24}01000000:|:1B58$/ { print $2 }'
}

addresses_6() { on "$1" shell 'cat /proc/net/if_inet6' | awk '$6 == "eth0" { print $1 "/" $3 }' | sort; }
routes_6() { on "$1" shell 'cat /proc/net/ipv6_route' | awk '$10 == "eth0" { print $1 "/" $2, $5 }' | sort; }

# What two guests are told, and what is to be seen of it.
PREFIX=fd000001000200030000000000000000/40
DEFAULT=00000000000000000000000000000000/00
GATEWAY=fd000001000200030000000000000001
NONE=00000000000000000000000000000000

# join NAME HASH IPV4 IPV6
join() {
    check "network: $1 is configured" on "$1" configure "$APPS/neighbour" main:app --hash "$2" \
        --ip "$3" --route 10.0.2.2 --ipv6 "$4/64" --ipv6-gateway fd00:1:2:3::1 \
        --dns 192.0.2.53 --dns 192.0.2.53 --dns 2001:db8::53
}

has_route_4() {
    on "$1" shell 'cat /proc/net/route' |
        awk -v to="$2" -v by="$3" -v mask="$4" '$1 == "eth0" && $2 == to && $3 == by && $8 == mask { ok = 1 } END { exit !ok }'
}

# ---- two guests --------------------------------------------------------------------------

boot -- $(nic 01 on)
aside one
check_eq 'T8: nothing of ours listens on a network' '' "$(listeners one)"
check_eq 'T8: the interface is down before it is configured' 0x1002 "$(on one shell 'cat /sys/class/net/eth0/flags')"
on one shell 'rm -f /etc/resolv.conf; ln -s /no/where /etc/resolv.conf; echo "192.0.2.9 kept # a comment" >/etc/hosts'
boot guest.modules=root -- $(nic 02 off)
aside two
check_eq 'network: a guest whose NIC has no driver yet' 0 "$(on two shell 'ls /sys/class/net' | grep -c eth0)"
join one aa 10.0.2.15 fd00:1:2:3::7
join two bb 10.0.2.16/24 fd00:1:2:3::8

check 'network: IPv4 without mask is /24' has_route_4 one 0002000A 00000000 00FFFFFF
check 'network: with mask, too' has_route_4 two 0002000A 00000000 00FFFFFF
check_match 'network: the address is there' '10\.0\.2\.15' "$(on one shell 'cat /proc/net/fib_trie')"
check 'network: IPv4 default route' has_route_4 one 00000000 0202000A 00000000
check_match 'network: IPv6 address, not tentative' '^fd000001000200030000000000000007 .* 40 00 [028]2 +eth0$' \
    "$(on one shell 'cat /proc/net/if_inet6')"
check_match 'network: IPv6 prefix' "^$PREFIX $NONE$" "$(routes_6 one)"
check_match 'network: IPv6 default route' "^$DEFAULT $GATEWAY$" "$(routes_6 one)"
for host in 10.0.2.16 fd00:1:2:3::8; do
    check_eq "network: one reaches two by TCP at $host" xm "$(on one request "/$host")"
done
for host in 10.0.2.15 fd00:1:2:3::7; do
    check_eq "network: two reaches one by TCP at $host" vi "$(on two request "/$host")"
done
for host in 127.0.0.1 ::1 localhost vi; do
    check_eq "network: one reaches itself as $host" vi "$(on one request "/$host")"
done

# ---- names -------------------------------------------------------------------------------

check_eq 'network: name servers, each once, over a link that led nowhere' \
    $'nameserver 192.0.2.53\nnameserver 2001:db8::53' "$(on one shell 'cat /etc/resolv.conf')"
check_eq 'network: /etc/hosts keeps what it had and gets what it lacked' \
    $'192.0.2.9 kept # a comment\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tvi' \
    "$(on one shell 'cat /etc/hosts')"
check_eq 'network: a name of it is found' 192.0.2.9 \
    "$(in_python one 'import socket; print(socket.gethostbyname("kept"))')"

# ---- T8: a neighbour ---------------------------------------------------------------------

# A router that wants everybody's traffic: RFC 4861, 4.2, with a prefix (4.6.2) to make
# addresses of and a name server (RFC 8106, 5.1).
ADVERTISE='
import socket as s, struct
prefix = s.inet_pton(s.AF_INET6, "fd66::")
ra = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
ra += struct.pack("!BBBBIII", 3, 4, 64, 0xc0, 86400, 86400, 0) + prefix
ra += struct.pack("!BBHI", 25, 3, 0, 86400) + prefix
raw = s.socket(s.AF_INET6, s.SOCK_RAW, s.IPPROTO_ICMPV6)
raw.setsockopt(s.IPPROTO_IPV6, s.IPV6_MULTICAST_HOPS, 255)
raw.sendto(ra, ("ff02::1", 0, 0, s.if_nametoindex("eth0")))
print("sent")'

# Until it has arrived, as the kernel counts it.
advertisements() { on one shell 'cat /proc/net/snmp6' | awk '$1 == "Icmp6InRouterAdvertisements" { print $2 }'; }
has_heard() { [ "$(advertisements)" -gt "$1" ]; }
advertise() {
    local before
    before=$(advertisements)
    in_python two "$ADVERTISE"
    wait_for 5 has_heard "$before"
}
has_fd66() { addresses_6 one | grep -q '^fd66'; }

NOW=$(addresses_6 one; routes_6 one)
check 'T8: a neighbour advertises itself as the router' advertise
check_eq 'T8: addresses and routes are those of the configuration' "$NOW" "$(addresses_6 one; routes_6 one)"
check_eq 'T8: name servers, too' 2 "$(on one shell 'cat /etc/resolv.conf' | grep -c nameserver)"
check_eq 'T8: nothing but the program listens on the network' '' "$(listeners one)"
check_match 'T8: which is seen' ':1B58 ' "$(on one shell 'cat /proc/net/tcp')"
on one shell 'cd /proc/sys/net/ipv6/conf/eth0; echo 1 >accept_ra; echo 1 >autoconf'
check 'T8: (the same is taken by who accepts it)' advertise
check 'T8: (and gives an address)' wait_for 5 has_fd66
unspawn ${PIDS[one]} ${PIDS[two]}

# ---- a root that cannot be written -------------------------------------------------------

# An initramfs whose init comes after the usual one and takes its place: no overlay is to be
# had, and /etc is a folder of the read-only root that holds a file and a link to nowhere.
overriding_initramfs "$T/initrd" "$MODULES_DISK ${MODULES_REST/overlay/}" <<'INIT'
$bb mount -t tmpfs tmpfs /root/lib/modules
$bb mkdir /etc
$bb mount -t tmpfs tmpfs /etc
$bb cp -a /root/etc/. /etc/
$bb rm -f /etc/hosts /etc/resolv.conf
echo "127.0.0.1 localhost" >/etc/hosts
$bb ln -s ../run/resolver/resolv.conf /etc/resolv.conf
$bb mount -o remount,ro /etc
$bb mount --move /etc /root/etc
$bb mount --move /dev /root/dev
$bb umount /proc
exec $bb switch_root /root /sbin/init
INIT
boot -- -initrd "$T/initrd"
check_match 'network: a root without overlay' '^/dev/vda / ext4 ro' "$(shell 'cat /proc/mounts')"
refused 'network: a program that fails there' 1 'at import' \
    configure "$APPS/broken/raises.py" app --hash cc --dns 192.0.2.53
check_eq 'network: leaves /etc as it was' '127.0.0.1 localhost' "$(shell 'cat /etc/hosts /etc/resolv.conf 2>/dev/null')"
check 'network: one that runs' configure "$APPS/plain/main.py" app --hash cc --dns 192.0.2.53 --ip 10.0.2.15
check_eq 'network: has name servers' 'nameserver 192.0.2.53' "$(shell 'cat /etc/resolv.conf')"
check_match 'network: and its name' $'^127.0.1.1\tzq$' "$(shell 'cat /etc/hosts')"
assert_console_has 'network: an address without a NIC is no error' 'no interface'
