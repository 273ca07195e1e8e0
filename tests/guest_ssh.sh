#!/usr/bin/env bash
# A real sshd in a guest: shortcoming 15 of the two scripts and threat T8. Full matrix: an
# emulated machine takes its time over keys. (ssh.sh has all but the server.)
. "$(dirname "$0")/lib.sh"

GOOD=(request /)

# Listening TCP sockets beyond loopback, and bound UDP ones, as ADDRESS:PORT in hexadecimal.
listening() {
    shell 'cat /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6' |
        awk '($4 == "0A" || ($4 == "07" && $2 !~ /:0000$/)) && $2 !~ /^0100007F|^0{24}01000000/ { print $2 }'
}
server_runs() { shell 'cat /proc/[0-9]*/comm' | grep -q '^sshd$'; }
serves() { listening | grep -q '^00000000:0016$'; }

# ssh KEY COMMAND, within the guest.
guest_ssh() { shell "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes -o LogLevel=ERROR -i $1 root@127.0.0.1 '$2' 2>&1; echo status \$?"; }

boot -- $GUEST_NIC
check '15: without keys: configured' configure "$APPS/hello" main:app --ip 10.0.2.15/24
sleep 1
check '15: sshd is there and does not run' not server_runs
check_eq 'T8: nothing listens outside loopback' '' "$(listening)"
check_eq '15: it could' 'status 0' "$(shell 'mkdir -p /run/sshd; /usr/sbin/sshd -t; echo status $?')"

boot -- $GUEST_NIC
shell 'rm /etc/ssh/ssh_host_ed25519_key; for k in mine other; do ssh-keygen -q -t ed25519 -N "" -f /tmp/$k; done'
KEY=$(shell 'cat /tmp/mine.pub')
start=$(ms)
check '15: with a key: configured' configure "$APPS/hello" main:app --ip 10.0.2.15/24 --key "$KEY"
echo "   in $(($(ms) - start)) ms"
check '15: sshd runs' wait_for 60 serves
echo "   after $(($(ms) - start)) ms"
check_match 'ssh: host keys were made' 'ssh_host_ed25519_key$' "$(shell 'ls /etc/ssh/*')"
baseline
check_eq 'ssh: the key opens' $'hello from root\nstatus 0' "$(guest_ssh /tmp/mine 'echo hello from $(whoami)')"
check_match 'ssh: another does not' 'Permission denied' "$(guest_ssh /tmp/other 'echo hello')"
check_eq 'ssh: nobody else listens' '00000000:0016' "$(listening | grep -v '^0*:0016$' || listening | head -n 1)"
check_eq 'ssh: the server is not limited as programs are' '0::/' \
    "$(shell 'for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = sshd ] && cat $p/cgroup; done | sort -u')"
guest_ok 'ssh: well afterwards'
shell 'ssh -o StrictHostKeyChecking=no -o BatchMode=yes -i /tmp/mine root@127.0.0.1 "trap : TERM HUP; while :; do sleep 1; done" >/dev/null 2>&1 </dev/null & sleep 1'
start=$(ms)
check 'ssh: halts with a session open' call halt
check_at_most 'ssh: within 5 s, in ms' 5000 $(($(ms) - start))
check 'ssh: the machine ends' wait_for 3 is_gone "$GUEST_QEMU_PID"
