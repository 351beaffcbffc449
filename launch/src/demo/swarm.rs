//! The demo's processes: each peer is this same binary in a directory of its own, and says what it says into `peer.log`.

use std::fs::{File, OpenOptions};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coordinatorless::types::PeerId;
use rustix::process::{Pid, Signal, kill_process};

use crate::peer_dir::PeerDir;

/// One peer of the demo.
pub struct Peer {
    /// Who.
    pub id: PeerId,
    /// Its directory.
    pub dir: PeerDir,
    /// Whether it is meant to be running.
    pub wanted: bool,
    /// Hidden arguments of its own.
    pub extra: Vec<String>,
    child: Option<Child>,
}

impl Peer {
    /// A peer that is not running yet.
    pub fn new(id: PeerId, dir: PeerDir, extra: Vec<String>) -> Self {
        Self {
            id,
            dir,
            wanted: false,
            extra,
            child: None,
        }
    }

    /// Starts `murmur ARGS… --dir DIR`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(&mut self, args: &[&str]) -> Result<()> {
        let log = self.log()?;
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let mut command = Command::new(program);
        command.args(args).args(&self.extra).arg("--dir").arg(self.dir.path());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Ctrl-C on the terminal is the demo's to pass on: a peer in its group would be interrupted twice.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        for variable in ["MURMUR_DIR", "MURMUR_THREADS", "MURMUR_BIND", "MURMUR_RELAY"] {
            command.env_remove(variable);
        }
        self.child = Some(command.spawn().context("cannot start a peer")?);
        self.wanted = true;
        Ok(())
    }

    fn log(&self) -> Result<File> {
        let path = self.dir.log_file();
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }

    /// Ends it at once (SIGKILL): it can save nothing and tell nobody.
    pub fn kill(&mut self) {
        self.wanted = false;
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to leave (SIGINT).
    pub fn interrupt(&mut self) {
        self.wanted = false;
        let pid = self
            .child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok())
            .and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::INT);
        }
    }

    /// Whether a process is there.
    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| child.try_wait().is_ok_and(|status| status.is_none()))
    }

    /// How it ended, if it was meant to run and does not.
    pub fn unexpected_end(&mut self) -> Option<ExitStatus> {
        if !self.wanted {
            return None;
        }
        let status = self.child.as_mut()?.try_wait().ok()??;
        self.wanted = false;
        Some(status)
    }

    /// The last lines that it said.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(self.dir.log_file()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..]
            .iter()
            .map(|line| format!("        | {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Interrupts all, waits, and kills who does not end. Returns those who had to be killed.
pub fn stop(peers: &mut [Peer], patience: Duration) -> Vec<PeerId> {
    peers.iter_mut().for_each(Peer::interrupt);
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline && peers.iter_mut().any(Peer::is_running) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let stubborn: Vec<PeerId> = peers
        .iter_mut()
        .filter_map(|peer| peer.is_running().then_some(peer.id))
        .collect();
    peers.iter_mut().for_each(Peer::kill);
    stubborn
}

impl Drop for Peer {
    /// However the demo ends, no process of it stays behind.
    fn drop(&mut self) {
        self.kill();
    }
}
