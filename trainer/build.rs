//! Compiles the door to what tch does not bind, and writes the folder of libtorch into what is linked here, so that binaries and tests
//! start without LD_LIBRARY_PATH.
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/kernels/libtorch.cpp");
    let libtorch: Option<PathBuf> = std::env::var_os("LIBTORCH").map(Into::into);
    let mut door = cc::Build::new();
    door.cpp(true).std("c++17").file("src/kernels/libtorch.cpp");
    if let Some(libtorch) = &libtorch {
        // Not as ours: their warnings are theirs.
        door.flag("-isystem").flag(libtorch.join("include"));
    }
    door.compile("murmur_libtorch");
    if let Some(libtorch) = libtorch {
        let lib = libtorch.join("lib");
        // The real path, not the link: the binary keeps working when the link is renewed.
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", lib.display());
    }
}
