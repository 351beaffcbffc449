//! Network namespaces for the tests that need root: hosts with cables between them, on one machine.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Running;

/// `ip ARGS`, which must succeed.
pub fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Namespaces that go when the test does.
pub struct Namespaces {
    prefix: String,
    made: Vec<String>,
}

impl Namespaces {
    /// None yet; `mark` keeps tests of one process apart.
    pub fn new(mark: &str) -> Self {
        let prefix = format!("mm{}{mark}", std::process::id());
        Self {
            prefix,
            made: Vec::new(),
        }
    }

    /// The namespace of this name.
    pub fn of(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Makes a namespace.
    pub fn add(&mut self, name: &str) -> String {
        let full = self.of(name);
        ip(&format!("netns add {full}"));
        self.made.push(full.clone());
        ip(&format!("-n {full} link set lo up"));
        full
    }

    /// Makes a switch: a namespace with a bridge.
    pub fn add_switch(&mut self, name: &str) {
        let switch = self.add(name);
        ip(&format!("-n {switch} link add br0 type bridge"));
        ip(&format!("-n {switch} link set br0 up"));
    }

    /// A cable from `dev` of a host, which gets the address, to a switch.
    pub fn plug(&self, host: &str, dev: &str, address: &str, switch: &str) {
        let (at, on) = (self.of(host), self.of(switch));
        ip(&format!("-n {at} link add {dev} type veth peer name {host} netns {on}"));
        ip(&format!("-n {at} addr add {address} dev {dev}"));
        ip(&format!("-n {at} link set dev {dev} up"));
        ip(&format!("-n {on} link set dev {host} master br0"));
        ip(&format!("-n {on} link set dev {host} up"));
    }

    /// Starts a shell command in a namespace and waits for it; whether it succeeded, and what it said.
    pub fn sh(&self, host: &str, script: &str) -> (bool, String) {
        let args = ["netns", "exec", &self.of(host), "bash", "-c", script];
        let output = Command::new("ip").args(args).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// Starts `murmur ARGS` on a host; what it says goes to `HOST.log`.
    pub fn murmur(&self, home: &Path, host: &str, args: &[&str]) -> Running {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(home.join(format!("{host}.log")))
            .unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.of(host), env!("CARGO_BIN_EXE_murmur")])
            .args(args)
            .current_dir(home)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        Running(child.unwrap())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.made {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}
