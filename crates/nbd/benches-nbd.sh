#!/bin/bash
# NBD servers side by side: fio through libnbd over a unix socket, several rounds, in turn.
#
#   benches-nbd.sh SERVE [ROUNDS] [SECONDS] [FOLDER ...]
#
# SERVE is the built example `serve` of this crate. Each FOLDER (default: the current one and
# /dev/shm) gets a file of 1 GiB that is in the page cache. Prints medians and ratios to the
# quickest of the others. Needs fio with the nbd engine, jq, qemu-nbd and nbdkit.
set -euo pipefail

serve=$(realpath "$1")
rounds=${2:-5}
seconds=${3:-3}
shift $(($# < 3 ? $# : 3))
folders=("$@")
[ ${#folders[@]} -gt 0 ] || folders=(. /dev/shm)
work=$(mktemp -d)
pids=()
mkfifo "$work/never"
exec 9<>"$work/never"
trap 'for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; rm -rf "$work"' EXIT

start() { # name, image: a socket appears
    local socket=$work/$1.sock
    case $1 in
        vmferry) "$serve" "unix:$socket" "$2" >/dev/null <&9 & ;;
        qemu-nbd) qemu-nbd -f raw -t -e 16 -x disk -k "$socket" "$2" & ;;
        nbdkit) nbdkit -f -U "$socket" -e disk file "$2" & ;;
    esac
    pids+=($!)
    while [ ! -S "$socket" ]; do sleep 0.05; done
}

measure() { # socket, rw, bs, depth, field
    fio --name=x --ioengine=nbd --uri="nbd+unix:///disk?socket=$1" --rw="$2" --bs="$3" \
        --iodepth="$4" --time_based --runtime="$seconds" --size=1g --randrepeat=0 \
        --output-format=json | sed -n '/^{/,$p' |
        jq ".jobs[0] | (.read.$5 + .write.$5) | floor"
}

median() { sort -n "$1" | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

for folder in "${folders[@]}"; do
    image=$(realpath "$folder")/nbd-bench.$$.img
    head -c 1G /dev/urandom >"$image"
    cat "$image" >/dev/null
    printf '%s\n' "== $folder"
    printf '%-22s %12s %12s %12s %8s\n' work vmferry qemu-nbd nbdkit ratio
    for work_load in "randread 4k 16 iops" "randwrite 4k 16 iops" "randread 256k 4 bw" "randwrite 256k 4 bw"; do
        read -r rw bs depth field <<<"$work_load"
        for ((round = 0; round < rounds; round++)); do
            for server in vmferry qemu-nbd nbdkit; do
                start $server "$image"
                measure "$work/$server.sock" "$rw" "$bs" "$depth" "$field" >>"$work/$server.$rw.$bs"
                kill "${pids[-1]}"
                wait "${pids[-1]}" 2>/dev/null || true
                unset 'pids[-1]'
                rm -f "$work/$server.sock"
            done
        done
        a=$(median "$work/vmferry.$rw.$bs")
        b=$(median "$work/qemu-nbd.$rw.$bs")
        c=$(median "$work/nbdkit.$rw.$bs")
        printf '%-22s %12s %12s %12s %8s\n' "$rw $bs depth $depth" "$a" "$b" "$c" \
            "$(awk -v a="$a" -v b="$b" -v c="$c" 'BEGIN { printf "%.2f", a / (b > c ? b : c) }')"
        rm -f "$work"/*.4k "$work"/*.256k
    done
    rm -f "$image"
done
