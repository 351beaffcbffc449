//! Compiles the door to what tch does not bind, and writes the folder of libtorch into what is linked here, so that binaries and tests start without
//! LD_LIBRARY_PATH.
fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/kernels/libtorch.cpp");
    cc::Build::new()
        .cpp(true)
        .file("src/kernels/libtorch.cpp")
        .compile("murmur_libtorch");
    if let Some(dir) = std::env::var_os("LIBTORCH") {
        let lib = std::path::Path::new(&dir).join("lib");
        // The real path, not the link: the binary keeps working when the link is renewed.
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", lib.display());
    }
}
