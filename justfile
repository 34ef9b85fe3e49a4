# format, lints, docs
check:
    cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings && RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# all tests
test:
    cargo test --workspace

# what the machine can do and what QSFS does, in one run; rewrites docs/benchmarks.md
bench *ARGS:
    cargo bench -p qsfs --bench whole -- {{ARGS}} --write "{{justfile_directory()}}/docs/benchmarks.md"

# a cluster, a volume and a mount at ./mnt; Ctrl-C ends it
demo:
    mkdir -p mnt && cargo run --release -- dev ./mnt

# the fuzz targets of the 0-db, SECONDS each
fuzz SECONDS="5" *TARGETS:
    zdb/fuzz/run {{SECONDS}} {{TARGETS}}

# three real metads under partitions, kill -9, SIGSTOP, full disks and changes of members, then all checkers; --help lists ARGS
jepsen *ARGS:
    cargo test -p qsfs --test metad_faults -- run {{ARGS}}

# one seed of the simulated metad cluster, in virtual time: `just sim 7`, `just sim 7 --faults partition,crash --trace`
sim SEED="1" *ARGS:
    cargo run --quiet --package qsfs-jepsen-tests --bin qsfs-sim -- {{SEED}} {{ARGS}}
