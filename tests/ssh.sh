#!/usr/bin/env bash
# SSH keys in namespaces, with a server that only says what it sees: shortcoming 15 of the two
# scripts. A real one is in tests/guest_ssh.sh.
. "$(dirname "$0")/lib.sh"

KEY='ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGreatKeyThatOpensNothingAtAll01234567 somebody'
FOLDER=/root/.ssh
GOOD=(shell 'echo hello')

# The root has a server and a key generator of ours, and no keys.
NS_PREPARE='rm -rf root/.ssh etc/ssh run/sshd; mkdir -p root usr/sbin usr/bin; rm -f usr/sbin/sshd usr/bin/ssh-keygen
printf "#!/bin/sh\necho \"makes keys: \$*\"\n: >/tmp/made\n" >usr/bin/ssh-keygen
printf "#!/bin/sh\necho \"serves: \$*\"\nls -d /run/sshd /tmp/made\nexec 9>&-\nls /proc/self/fd | xargs echo descriptors\ntrap \"echo ends; exit 0\" TERM\nwhile :; do sleep 0.1; done\n" >usr/sbin/sshd
chmod 755 usr/sbin/sshd usr/bin/ssh-keygen'

look() { shell "cd $FOLDER && stat -c '%a %U %F %n' . * && cat authorized_keys" 2>&1; }
has_said() { guest_console_has "^sshd\[[0-9.]+\]: $1"; }
sshd_runs() { [ "$(shell 'cat /proc/[0-9]*/comm' | grep -c '^sshd$')" != 0 ]; }

# ---- no keys -------------------------------------------------------------------------------

ns_start
check '15: without keys: configured' configure "$APPS/hello" main:app
sleep 0.5
check '15: without keys no server runs' not sshd_runs
check_eq '15: and no keys are there' 'no' "$(shell "[ -e $FOLDER ] || echo no")"

# ---- keys ----------------------------------------------------------------------------------

ns_start
baseline
refused 'ssh: a key with a newline' 1 'authorized_keys\[1\]: is more than one line' \
    configure "$APPS/hello" main:app --key "$KEY" --key "a"$'\n'"command=\"x\" b"
refused 'ssh: a key of 20 KiB' 1 'authorized_keys\[0\]: 20000 bytes, at most 16384' \
    configure "$APPS/hello" main:app --key "$(printf '%020000d' 0)"
refused 'ssh: a program that does not start' 1 'no_such' configure "$APPS/hello" main:no_such --key "$KEY"
check_eq 'ssh: its keys are taken back' 'no' "$(shell "[ -e $FOLDER ] || echo no")"
shell "mkdir /tmp/evil; ln -s /tmp/evil $FOLDER"
refused 'ssh: a folder that is a link' 1 "authorized_keys: $FOLDER/authorized_keys: " \
    configure "$APPS/hello" main:app --key "$KEY"
check_eq 'ssh: nothing is written through it' '' "$(shell 'ls -A /tmp/evil')"
shell "rm $FOLDER; mkdir -m 755 $FOLDER; echo 'old key' >$FOLDER/authorized_keys; echo 'other' >$FOLDER/config"
refused 'ssh: a program that does not start, on a machine with keys' 1 'no_such' \
    configure "$APPS/hello" main:no_such --key "$KEY"
check_eq 'ssh: the keys of before are back' 'old key' "$(shell "cat $FOLDER/authorized_keys")"
check_eq 'ssh: and nothing else is there' 'authorized_keys config' "$(shell "ls -A $FOLDER" | xargs)"
check 'ssh: no server ran' not has_said serves
shell "rm $FOLDER/*; ln -s /tmp/evil/through $FOLDER/authorized_keys"
guest_ok 'ssh: well afterwards'

check 'ssh: configured' configure "$APPS/hello" main:app --key "$KEY" --key 'ssh-rsa second'
check_eq 'ssh: modes and contents' "700 root directory .
600 root regular file authorized_keys
777 root symbolic link authorized_keys.before-agent
$KEY
ssh-rsa second" "$(look)"
check_eq 'ssh: nothing is written through a link' '' "$(shell 'ls -A /tmp/evil')"
check 'ssh: the server runs' wait_for 5 has_said 'serves: -D -e'
check 'ssh: among the processes' sshd_runs
check 'ssh: host keys are made first' wait_for 5 has_said '/tmp/made'
assert_console_has 'ssh: as ssh-keygen can' '^sshd.*makes keys: -A'
check 'ssh: /run/sshd is there' has_said '/run/sshd'
check 'ssh: the server begins with descriptors 0 to 2 (3 is the list)' wait_for 5 has_said 'descriptors 0 1 2 3$'
check_eq 'ssh: the server is not among the programs' '' \
    "$(shell 'for p in $(cat /sys/fs/cgroup/program/cgroup.procs); do cat /proc/$p/comm; done' | grep sshd || true)"
check 'ssh: halts' halt
assert_console_has 'ssh: halt ends the server' '^sshd.*ends'
assert_console_has 'ssh: the log says how it ended' 'sshd exited with exit code 0'

# ---- no server -----------------------------------------------------------------------------

NS_PREPARE='rm -rf root/.ssh usr/sbin/sshd'
ns_start
check 'ssh: no server in the image: configured' configure "$APPS/hello" main:app --key "$KEY"
assert_console_has 'ssh: the log says so' 'keys are given, but there is no /usr/sbin/sshd'
