#!/bin/sh
# Runs the tests of the SIMD code for 64-bit Arm: as they are on such a machine, elsewhere
# compiled statically and emulated by qemu. Debian's packages bring compiler and emulator; they
# are installed where that is possible without asking. Says SKIPPED and succeeds where it is not.
#
# With a dynamic C library, programs that start threads hang under qemu 7.2: hence the static one.
set -eu
cd "$(dirname "$0")/.."

tests="--test blockwise --test blockwise_simd --test matmul --test optimizer"
triple=aarch64-unknown-linux-gnu
libraries=/usr/lib/rustlib/$triple/lib

skip() {
    echo "NEON tests SKIPPED: $1"
    exit 0
}

if [ "$(uname -m)" = aarch64 ]; then
    exec cargo test $tests
fi

missing() {
    ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null ||
        [ ! -x /usr/bin/rustc ] || [ ! -d $libraries ]
}

if missing; then
    command -v apt-get >/dev/null || skip "no apt-get to install a cross compiler and qemu with"
    [ "$(id -u)" = 0 ] || skip "not root, and a cross compiler or qemu is missing"
    log=$(mktemp)
    {
        dpkg --add-architecture arm64 && apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
                rustc-web libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu \
                libc6-dev-arm64-cross qemu-user
    } >"$log" 2>&1 || skip "the packages cannot be had: $(tail -n 1 "$log")"
    ! missing || skip "the packages were installed, yet $libraries or a program is missing"
fi

# Half the time goes into debug information otherwise.
export CARGO_PROFILE_DEV_DEBUG=false
export RUSTC=/usr/bin/rustc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
exec cargo test --target $triple $tests
