//! Compiles `proto/qsfs.proto` with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/qsfs.proto");
    let files = protox::compile(["qsfs.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".qsfs.v1.MutateCall")
        .bytes(".qsfs.v1.RaftMessage")
        .bytes(".qsfs.v1.RaftReply")
        .compile_fds(files)?;
    Ok(())
}
