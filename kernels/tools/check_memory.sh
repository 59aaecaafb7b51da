#!/usr/bin/env bash
# The kernel tests (integers, signs and distances, in the driver and in Python) under the address, undefined-behaviour and thread sanitizers and under valgrind.
# Needs cmake, ninja, gcc or clang, valgrind, and a Python environment with pytest and hypothesis (PYTHON, default
# python3). Valgrind knows no AVX-512 and no AVX-VNNI: the instruction sets it reports are AVX2 and the reference.
set -euo pipefail

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
jobs=${JOBS:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() {  # folder, further definitions
    local folder=$1
    shift
    echo "== $(basename "$folder")"
    cmake -S "$source" -B "$folder" -G Ninja -DBITSMITH_KERNELS_DRIVER=ON "$@" >"$work/log" ||
        { cat "$work/log"; return 1; }
    ninja -C "$folder" -j "$jobs" driver bitsmith_kernels >"$work/log" || { cat "$work/log"; return 1; }
}

valgrind_run() {
    build "$work/valgrind" -DCMAKE_CXX_FLAGS=-g1
    valgrind -q --error-exitcode=1 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
        "$work/valgrind/driver" 40
}

thread_run() {
    build "$work/thread" -DBITSMITH_KERNELS_SANITIZE=thread
    "$work/thread/driver" 100
}

address_run() {  # several minutes to compile
    build "$work/address" -DBITSMITH_KERNELS_SANITIZE=address,undefined
    "$work/address/driver" 300
    echo "== pytest with the same shared library"
    mkdir -p "$work/site"
    cp -r "$source/src/bitsmith_kernels" "$work/site"
    cp "$work/address/libbitsmith_kernels.so" "$work/site/bitsmith_kernels"
    # not the inner loops: those of such a build are not those that are shipped
    cd "$source"
    PYTHONPATH="$work/site" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
        LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)" \
        "$python" -m pytest -q -p no:cacheprovider --ignore=tests/test_inner_loops.py
}

for run in ${*:-valgrind thread address}; do
    "${run}_run"
done
