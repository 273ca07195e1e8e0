#!/usr/bin/env bash
# `agent hash`: a file's item_hash for both storage engines. What is expected was computed by the npm
# package ipfs-only-hash (CIDv0, no raw leaves) and sha256sum.
. "$(dirname "$0")/lib.sh"

need openssl

# stream BYTES: the key stream of AES-128 in counter mode, its key and counter zero.
stream() {
    openssl enc -aes-128-ctr -K "$(printf '%032d' 0)" -iv "$(printf '%032d' 0)" -in /dev/zero 2>/dev/null | head -c "$1" || true
}

hashes() { "$AGENT" hash "$1" | sed -n 's/^item_hash.*: //p' | tr '\n' ' '; }

# The empty file, one leaf, around its size, some leaves, around what one node links to, two levels.
while read -r bytes sha cid; do
    [ "$bytes" != 314572800 ] || ! is_sanitized || continue
    stream "$bytes" >"$T/file"
    check_eq "hash: of $bytes bytes" "$sha $cid " "$(hashes "$T/file")"
done <<'END'
0 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH
1 252f10c83610ebca1a059c0bae8255eba2f95be4d1d7bcfa89d7248a82d9f111 QmQGb6CHE3S7BK7gJCBNNnDAALk8pXokXH8Krhy77nsEma
1000 8e73943c050f1bab995d99e8d0eff49c49cd68c5a4a3998d9c0025b87ef39d90 Qmc5XocZn7LaGQuSRGtLwcMpU77rkeSvTnVTuUAzn69w4p
262144 53b570a95dad85962100bb1fac5dbaebd35ab4594c8c48ed8ba25bec5b86e99c QmcbhqEneCpQD8KrkgDuN1FBXv6cjCxTSWpNMEecC7C2dA
262145 8ea6489b7ad7ad14de13f62f03de456ccb31e63776092ac068af9768a267b038 QmeHYS2duenz96c1s5g5DaNHZYawncykge5CJTRuHczR15
1048576 cbe2b262041a8db47d844bcaccfaa76de692ca1410e9920198b250445175e1b8 QmZ7cFxvnQUQw7T7fxDWxRXsNLyaFsxqYNArBLDJ5Whyt2
45613056 26091b243c475fe0569712a1132e84ba8e2cd240444f5c01000b38db58b76768 QmTtjhiK8EYa22JKyH4rJEwaTou7uzR6V12E9UA7tXVJZG
45613057 5cb719d99f86091789f4459c763a77866362404a17f7c3346168b35097a47201 QmRnxi88xtknvr7Fj3E2NBA5wBB69jjZfTMSat4vsM3BGW
314572800 fca9adbf89188efc419b50ff6909f410a26111145da3a65a3d779824a203d2ea QmW8XjSosxiXikaJea1NrtFZUd5wWJbKpHXH3X3p9L1VrF
END

printf 'hello world\n' >"$T/hello"
printf x >"$T/x"
SHA=a948904f2f0f479b8f8197694b30184b0d2ed1c1cd2a1ec0fb85d299a192a447
CID=QmT78zSuBmuS4z925WZfrqQ1qHaJ56DQaTfyMUF7F8ff5o
check_eq 'hash: says file and size' "$T/hello: 12 bytes" "$("$AGENT" hash "$T/hello" | head -n 1)"
check 'hash: verifies a SHA-256' "$AGENT" hash --verify "$SHA" "$T/hello"
check 'hash: verifies a CID' "$AGENT" hash --verify "$CID" "$T/hello"
refused 'hash: another file is told' 1 'x is not Qm' "$AGENT" hash --verify "$CID" "$T/hello" "$T/x"
refused 'hash: a CIDv1 is told' 2 'bafk.* is no item_hash: expected a SHA-256' "$AGENT" hash --verify bafkreif "$T/hello"
refused 'hash: a file that is not there' 1 'no: No such file' "$AGENT" hash "$T/no"
refused 'hash: a folder' 1 'Is a directory' "$AGENT" hash "$T"
refused 'hash: no file' 2 '^usage: agent hash' "$AGENT" hash
refused 'hash: --help' 0 '^usage: agent hash' "$AGENT" hash --help
