//! The command line. Help texts are these doc comments; every command ends its help with an example.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cheat::Cheat;
use crate::commands::wait::Condition;
use crate::peer_dir::PeerFile;
use crate::units::Bytes;

/// Trains one model together on machines that owe each other nothing: no master, no coordinator.
#[derive(Debug, Parser)]
#[command(
    name = "murmur",
    version,
    max_term_width = 110,
    after_help = "Exit code: 0 done, 1 failed, 2 wrong usage or input.\nExample:\n  murmur demo"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// What to log on stderr: error, warn, info, debug, trace, or as in `murmur=debug,iroh=info`.
    #[arg(
        long,
        global = true,
        env = "MURMUR_LOG",
        value_name = "FILTER",
        default_value = "murmur=info,coordinatorless=warn,gradient_verify=info,iroh_blobs=off,error"
    )]
    pub log: String,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A member from its directory, as the demo starts them.
    #[command(hide = true)]
    Peer(PeerArgs),
    /// Shows it all on this machine: several peers train together on real text; one is killed and comes back, one joins.
    #[command(after_help = "Example:\n  murmur demo\n  murmur demo --kill founder --rounds 20 --json")]
    Demo(DemoArgs),
    /// Creates a run, becomes its first member, prints the ticket and trains until Ctrl-C.
    #[command(after_help = "Example:\n  murmur new launch/runs/small.toml --set training.optimizer.lr=0.001")]
    New(NewArgs),
    /// Takes part in a run: fetch, verify, train until Ctrl-C. Again with the same --dir: the same member.
    #[command(after_help = "Example:\n  murmur join murmur1abc… --dir ~/murmur --max-upload 5M --max-disk 20G")]
    Join(JoinArgs),
    /// Trains alone, without a network: same code, same records, same files.
    #[command(after_help = "Example:\n  murmur train launch/runs/small.toml --rounds 10")]
    Train(TrainArgs),
    /// Tells round, loss, members, speed and what this peer has earned; of a live peer or of what its directory holds.
    #[command(after_help = "Example:\n  murmur status --dir ~/murmur --json")]
    Status(ReportArgs),
    /// Prints a fresh ticket of a live peer, for others to join with.
    #[command(after_help = "Example:\n  murmur join $(murmur ticket --dir ~/murmur)")]
    Ticket(DirArg),
    /// Waits until a peer has come so far.
    #[command(
        after_help = "Example:\n  murmur wait --dir ~/murmur --until 'round>=10' --until 'members>=3' --timeout 600"
    )]
    Wait(WaitArgs),
    /// Continues a text with the model that a peer's directory holds, or with one from elsewhere.
    #[command(
        after_help = "Example:\n  murmur generate --dir ~/murmur \"To be, or not to be\" --max-tokens 200\n  murmur generate --model ./SmolLM2-135M.gguf \"The capital of France is\" --temperature 0"
    )]
    Generate(GenerateArgs),
    /// Tells a model's loss on a text, and what it expects next; without a text, its loss on the run's held-out data. Or answers multiple-choice
    /// questions.
    #[command(
        after_help = "Example:\n  murmur eval --dir ~/murmur\n  murmur eval --model ./SmolLM2-135M.gguf \"The capital of France is\" --top 5 --json\n  murmur eval --dir ~/murmur --tasks questions.jsonl"
    )]
    Eval(EvalArgs),
    /// Writes the model as a Hugging Face folder: config.json, model.safetensors, tokenizer.json, generation_config.json.
    #[command(
        after_help = "Example:\n  murmur export --dir ~/murmur ./model\n  murmur export --model ./SmolLM2-135M.gguf ./model"
    )]
    Export(ExportArgs),
    /// Prepares, shows and checks training data.
    #[command(subcommand, after_help = "Example:\n  murmur data prepare ./texts --out ./data")]
    Data(DataCommand),
    /// Shows balances; replays the record chain from genesis and compares every root.
    #[command(subcommand, after_help = "Example:\n  murmur ledger verify --dir ~/murmur")]
    Ledger(LedgerCommand),
    /// Computes again what somebody claims, and says whether it is so: a proof in a file, as `generate --prove` and `eval --prove` write them; or a member's round, from the
    /// record chain and the blobs that a peer's directory holds.
    #[command(
        after_help = "Exit code: 0 it is so, 1 it is not or cannot be computed, 2 wrong usage, no proof, or one of another model.\nExample:\n  murmur audit answer.proof --dir ~/murmur\n  murmur audit result.proof --dir ~/murmur --tasks questions.jsonl --sample 100\n  murmur audit --round 12 --member 1f2e3d --dir ~/murmur"
    )]
    Audit(AuditArgs),
    /// Runs a relay for peers that no other can dial, on a machine that all of them can.
    #[command(
        after_help = "Example:\n  murmur relay --bind 0.0.0.0:3340\n  murmur join murmur1abc… --relay http://203.0.113.7:3340"
    )]
    Relay(RelayArgs),
    /// Plays the protocol through under seeded faults, in virtual time, with the same code that runs over the network.
    #[command(after_help = "Example:\n  murmur sim --peers 16 --rounds 50 --seed 7 --json")]
    Sim(SimArgs),
    /// Measures this machine.
    #[command(subcommand, after_help = "Example:\n  murmur bench trainer --threads 2 --json")]
    Bench(BenchCommand),
}

/// Which peer's directory.
#[derive(Debug, Args)]
pub struct DirArg {
    /// The peer's directory; if there is only one under the XDG data home, that one.
    #[arg(long, env = "MURMUR_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Which model: a peer's, or one from elsewhere.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(flatten)]
    pub dir: DirArg,
    /// A model from elsewhere instead of a peer's: a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a GGUF file.
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
}

/// `murmur audit`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct AuditArgs {
    /// Or something else about audits.
    #[command(subcommand)]
    pub what: Option<AuditCommand>,
    /// The proof.
    #[arg(required_unless_present = "round")]
    pub file: Option<PathBuf>,
    /// The round.
    #[arg(long, value_name = "R", requires = "member", conflicts_with_all = ["file", "model", "prompt", "seed", "tasks"], value_parser = clap::value_parser!(u64).range(1..))]
    pub round: Option<u64>,
    /// Whose round: its id, or how that begins.
    #[arg(long, value_name = "M", requires = "round")]
    pub member: Option<String>,
    /// Fetch from peers of the run, while they run, what the directory lacks for that.
    #[arg(long, requires = "round")]
    pub fetch: bool,
    #[command(flatten)]
    pub source: ModelArgs,
    /// Refuse a text that continues anything but this.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Of an evaluation: how many items to compute again.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: u32,
    /// Of an evaluation: which items those are, together with the proof's root; the same for the same words [default: drawn anew, and told].
    #[arg(long, value_name = "WORDS")]
    pub seed: Option<String>,
    /// Of an evaluation on questions: the file that it was made with, to compare its questions.
    #[arg(long, value_name = "FILE")]
    pub tasks: Option<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "MURMUR_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Threads to compute with [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur audit …`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Measures how far apart honest and false rounds are on this machine, in every way that it can compute them, and where the bound should lie.
    #[command(after_help = "Example:\n  murmur audit calibrate launch/runs/demo.toml --out calibration")]
    Calibrate(CalibrateArgs),
    /// One process of `calibrate`.
    #[command(hide = true)]
    Replica(ReplicaArgs),
}

/// `murmur audit calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// The run file.
    pub run: PathBuf,
    /// Change a value of the run file, such as model.dim=64.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Where profile and plot are written; must be new or empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Rounds trained in each way.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Steps of a round.
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=65_536))]
    pub steps: u32,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur audit replica`.
#[derive(Debug, Args)]
pub struct ReplicaArgs {
    /// A directory with the run's configuration and data.
    #[arg(long)]
    pub peer: PathBuf,
    /// Where models are read and pseudo-gradients written.
    #[arg(long)]
    pub folder: PathBuf,
    /// What this way is called.
    #[arg(long)]
    pub name: String,
    /// fp32 or bf16.
    #[arg(long)]
    pub precision: String,
    /// Rounds.
    #[arg(long)]
    pub rounds: u32,
    /// Steps of a round.
    #[arg(long)]
    pub steps: u32,
    /// Threads.
    #[arg(long)]
    pub threads: usize,
    /// Sequences that go through the model at once.
    #[arg(long)]
    pub pieces: Option<usize>,
    /// What is done otherwise.
    #[arg(long)]
    pub departure: Option<String>,
}

/// A report on a peer.
#[derive(Debug, Args)]
pub struct ReportArgs {
    #[command(flatten)]
    pub dir: DirArg,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// What is local to a peer. A value comes from the flag, else the environment, else peer.toml in its directory.
#[derive(Debug, Default, Clone, Args)]
pub struct PeerOptions {
    /// Where to compute: cpu, cuda, cuda:N, auto for a GPU if there is one [default: auto], or several: cuda:0,cuda:1 or cuda:all.
    #[arg(long, env = "MURMUR_DEVICE", value_name = "DEVICE")]
    pub device: Option<String>,
    /// Threads to compute with [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Where to listen [default: any free port on every interface].
    #[arg(long, env = "MURMUR_BIND", value_name = "ADDR:PORT")]
    pub bind: Option<SocketAddr>,
    /// Relay for peers behind NAT: default, none or a URL [default: default].
    #[arg(long, env = "MURMUR_RELAY", value_name = "default|none|URL")]
    pub relay: Option<String>,
    /// Bytes a second to send at most, such as 5M.
    #[arg(long, env = "MURMUR_MAX_UPLOAD", value_name = "BYTES")]
    pub max_upload: Option<Bytes>,
    /// Bytes a second to receive at most, such as 20M.
    #[arg(long, env = "MURMUR_MAX_DOWNLOAD", value_name = "BYTES")]
    pub max_download: Option<Bytes>,
    /// Bytes on disk to use at most, such as 20G; what the run needs is kept regardless.
    #[arg(long, env = "MURMUR_MAX_DISK", value_name = "BYTES")]
    pub max_disk: Option<Bytes>,
    /// Keep the model of every N rounds, as `export` writes it, in DIR/kept/round-… .
    #[arg(long, env = "MURMUR_KEEP_EVERY", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub keep_every: Option<u64>,
    /// Of those, the last N [default: all].
    #[arg(long, env = "MURMUR_KEEP_LAST", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub keep_last: Option<u64>,
    /// Keep the model with the lowest loss on held-out text, measured every five rounds, in DIR/kept/best.
    #[arg(long, env = "MURMUR_KEEP_BEST", value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    pub keep_best: Option<bool>,
    /// Where your points are to be paid.
    #[arg(long, env = "MURMUR_PAYOUT_ADDRESS", value_name = "ADDRESS")]
    pub payout_address: Option<String>,
    /// Take part up to this round; then only serve the others until Ctrl-C (`train`: end).
    #[arg(long, value_name = "N")]
    pub rounds: Option<u64>,
}

impl PeerOptions {
    /// These options, where given, over what peer.toml says.
    pub fn over(&self, mut file: PeerFile) -> PeerFile {
        fn lay<T: Clone>(over: &Option<T>, under: &mut Option<T>) {
            if over.is_some() {
                under.clone_from(over);
            }
        }
        lay(&self.device, &mut file.device);
        lay(&self.threads, &mut file.threads);
        lay(&self.bind, &mut file.bind);
        lay(&self.relay, &mut file.relay);
        lay(&self.max_upload, &mut file.max_upload);
        lay(&self.max_download, &mut file.max_download);
        lay(&self.max_disk, &mut file.max_disk);
        lay(&self.keep_every, &mut file.keep_every);
        lay(&self.keep_last, &mut file.keep_last);
        lay(&self.keep_best, &mut file.keep_best);
        lay(&self.payout_address, &mut file.payout_address);
        file
    }
}

/// `murmur relay`.
#[derive(Debug, Args)]
pub struct RelayArgs {
    /// Where to listen, over TCP.
    #[arg(long, env = "MURMUR_BIND", default_value = "0.0.0.0:3340", value_name = "ADDR:PORT")]
    pub bind: SocketAddr,
    /// Bytes a second to take from one peer at most, such as 5M [default: no limit].
    #[arg(long, value_name = "BYTES")]
    pub max_rate: Option<Bytes>,
}

/// `murmur demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Peers that begin the run; one more joins at half.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=16), value_name = "N")]
    pub peers: u64,
    /// Rounds to train.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=10_000), value_name = "N")]
    pub rounds: u64,
    /// Text files and folders to train on [default: Shakespeare's plays, fetched once].
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub text: Vec<PathBuf>,
    /// Decides initial parameters and who is killed.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Where everything is written; must be new or empty [default: a new folder under the XDG data home].
    #[arg(long, env = "MURMUR_DEMO_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Whom to kill a third of the way.
    #[arg(long, default_value = "random", value_enum)]
    pub kill: Kill,
    /// Let one peer cheat in every round, and see it caught.
    #[arg(long, value_enum, value_name = "KIND")]
    pub cheat: Option<Cheat>,
    /// The way of training together: few values every round, or all of them, or single gradients.
    #[arg(long, value_enum, value_name = "NAME")]
    pub algorithm: Option<Algorithm>,
    /// Change a value of the run, as in `murmur new`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// The report as one JSON object on stdout; progress goes to stderr.
    #[arg(long)]
    pub json: bool,
}

/// The ways of training together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// Inner steps, then the largest values of what they found.
    Sparse,
    /// Inner steps, every value, momentum outside.
    Diloco,
    /// One gradient a round, a few coefficients of it.
    Demo,
    /// One gradient a round, whole.
    Ddp,
}

impl Algorithm {
    /// What it sets in a run.
    pub fn sets(self) -> &'static [&'static str] {
        match self {
            Self::Sparse => &["training.algorithm=sparse"],
            Self::Diloco => &["training.algorithm=diloco"],
            Self::Demo => &["training.algorithm=demo", "training.max_inner_steps=1"],
            Self::Ddp => &["training.algorithm=ddp", "training.max_inner_steps=1"],
        }
    }
}

/// Whom the demo kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kill {
    /// Any of the first peers.
    Random,
    /// The one that is first in the list.
    Founder,
    /// Nobody.
    None,
}

/// `murmur ledger …`.
#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// Shows who has which points.
    #[command(after_help = "Example:\n  murmur ledger show --dir ~/murmur")]
    Show(ReportArgs),
    /// Replays every record from genesis: signatures, certificates, rules, roots.
    #[command(after_help = "Example:\n  murmur ledger verify --dir ~/murmur --json")]
    Verify(ReportArgs),
}

/// `murmur data …`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Turns text files and folders into content-addressed token shards.
    #[command(after_help = "Example:\n  murmur data prepare ./texts --out ./data --tokenizer gpt2 --seq-len 512")]
    Prepare {
        /// Text files and folders.
        #[arg(required = true, value_name = "PATH")]
        sources: Vec<PathBuf>,
        /// Where to write; must be new or empty.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// bytes or gpt2.
        #[arg(long, default_value = "bytes")]
        tokenizer: String,
        /// Tokens predicted per sequence.
        #[arg(long, default_value_t = 128, value_name = "N")]
        seq_len: usize,
        /// Thousandths of the text kept for evaluation.
        #[arg(long, default_value_t = 20, value_name = "N")]
        held_out_permille: u32,
        /// One JSON object on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Shows what a data folder or a peer's directory holds.
    #[command(after_help = "Example:\n  murmur data inspect ./data")]
    Inspect {
        /// The folder.
        dir: PathBuf,
        /// One JSON object on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Shows which sequences the batches of a peer's run hold, so that its rounds can be trained again by other means.
    #[command(after_help = "Example:\n  murmur data batches ~/murmur --from 0 --count 8 --tokens --json")]
    Batches {
        /// A peer's directory.
        dir: PathBuf,
        /// The first batch; the run hands them out in this order.
        #[arg(long, default_value_t = 0, value_name = "I")]
        from: u64,
        /// How many.
        #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
        count: u64,
        /// With the tokens of each sequence: seq_len inputs and, one further on, their targets.
        #[arg(long)]
        tokens: bool,
        /// One JSON object a line on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Reads every shard again and compares its hash.
    #[command(after_help = "Example:\n  murmur data verify ./data")]
    Verify {
        /// The folder.
        dir: PathBuf,
        /// One JSON object on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// `murmur bench …`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tokens per second of training, beside this machine's arithmetic peak.
    #[command(
        after_help = "Examples:\n  murmur bench trainer --dim 256 --layers 6 --threads 2 --json\n  murmur bench trainer --standard"
    )]
    Trainer(BenchTrainerArgs),
    /// Bytes and speed of contributions.
    #[command(after_help = "Example:\n  murmur bench codec --params 16000000 --k 64 --json")]
    Codec(BenchCodecArgs),
    /// Messages, agreement and failure detection as peers grow more, in the simulator (two to three minutes).
    #[command(after_help = "Example:\n  murmur bench rounds --max-peers 128 --json")]
    Rounds(BenchRoundsArgs),
    /// How soon cheats are barred, and what they keep, under the vesting that runs have by default, in the simulator.
    #[command(after_help = "Example:\n  murmur bench audits --runs 200")]
    Audits(BenchAuditsArgs),
    /// Every way of training together, on the same model and tokens: losses against bytes, as tables and plots.
    #[command(
        after_help = "Examples:\n  murmur bench algorithms --dir report\n  murmur bench algorithms --preset long --dir report --model demo --arms sparse --arms ddp"
    )]
    Algorithms(BenchAlgorithmsArgs),
    /// Peers average a vector over real connections, from ready to applied.
    #[command(after_help = "Example:\n  murmur bench exchange --peers 4 --mib 64")]
    Exchange(BenchExchangeArgs),
    /// Proofs of an inference and of evaluations made in many ways, honest and not, each checked: distances, and whether each is judged rightly (exit code 1 if not).
    #[command(
        after_help = "Examples:\n  murmur bench proofs --dir ~/murmur \"To be, or not to be\"\n  murmur bench proofs --model ./SmolLM2-135M.gguf \"The capital of France is\" --max-tokens 64"
    )]
    Proofs(BenchProofsArgs),
    /// Floating-point operations a second that this machine can prove: answers challenges, alone and for several ids at once, and verifies them.
    #[command(after_help = "Example:\n  murmur bench flops --seconds 10 --json")]
    Flops(BenchFlopsArgs),
    /// One peer of `bench exchange`.
    #[command(hide = true)]
    ExchangePeer(ExchangePeerArgs),
}

/// `murmur bench flops`.
#[derive(Debug, Args)]
pub struct BenchFlopsArgs {
    /// About how long one challenge takes; there are two for each precision.
    #[arg(long, default_value_t = 10.0, value_name = "N", value_parser = seconds)]
    pub seconds: f64,
    /// Ids that are answered for at once, after one alone.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=16))]
    pub ids: u8,
    /// Threads to compute with [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "MURMUR_DEVICE", default_value = "auto")]
    pub device: String,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Seconds of a challenge.
fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text
        .parse::<f64>()
        .ok()
        .filter(|seconds| (0.1..=600.0).contains(seconds));
    seconds.ok_or_else(|| "expected 0.1 to 600 seconds".to_owned())
}

/// `murmur bench proofs`.
#[derive(Debug, Args)]
pub struct BenchProofsArgs {
    /// The text to continue, of at least two tokens.
    pub prompt: String,
    #[command(flatten)]
    pub source: ModelArgs,
    /// Tokens to add.
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_tokens: u32,
    /// Divides the scores; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8, value_name = "X")]
    pub temperature: f64,
    /// Threads of the honest, besides one [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "MURMUR_DEVICE", default_value = "auto")]
    pub device: String,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur bench exchange`.
#[derive(Debug, Args)]
pub struct BenchExchangeArgs {
    /// Peers, each a process of its own.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=64))]
    pub peers: u16,
    /// MiB of fp32 that each contributes to.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub mib: u16,
    /// Values kept per chunk of 4096.
    #[arg(long, default_value_t = 64)]
    pub k: usize,
    /// Send every value instead.
    #[arg(long)]
    pub dense: bool,
    /// Rounds counted, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// Run peer N in the network namespace PREFIXN instead of on loopback; needs root.
    #[arg(long, value_name = "PREFIX")]
    pub netns: Option<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur bench exchange-peer`.
#[derive(Debug, Args)]
pub struct ExchangePeerArgs {
    /// Which peer it is.
    #[arg(long)]
    pub number: u16,
    /// MiB of fp32.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub mib: u16,
    /// Values kept per chunk of 4096.
    #[arg(long)]
    pub k: usize,
    /// Send every value instead.
    #[arg(long)]
    pub dense: bool,
    /// Listen on every interface instead of loopback.
    #[arg(long)]
    pub everywhere: bool,
}

/// `murmur bench algorithms`.
#[derive(Debug, Args)]
pub struct BenchAlgorithmsArgs {
    /// A quarter of an hour on two idle cores, or some hours.
    #[arg(long, value_enum, default_value_t = BenchPreset::Short)]
    pub preset: BenchPreset,
    /// Series of your own instead, as the bench writes them to plan.toml in its folder.
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    pub plan: Option<PathBuf>,
    /// Folder of the results; a bench that was stopped goes on there.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Only arms whose names contain this; several times for several.
    #[arg(long, value_name = "WORDS")]
    pub arms: Vec<String>,
    /// Only this model of the preset.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Rounds of a run [default: the preset's].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rounds: Option<u64>,
    /// Files and folders of text instead of the demo's.
    #[arg(long, value_name = "PATH")]
    pub text: Vec<PathBuf>,
    /// Runs side by side, one thread each [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Plans of `murmur bench algorithms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchPreset {
    /// Every arm on a small model.
    Short,
    /// More tokens, learning rates and attacks, then more workers.
    Long,
    /// A few arms on models of three sizes.
    Sizes,
}

/// `murmur bench trainer`; what is not given of a shape is that of a small byte-level model.
#[derive(Debug, Args)]
pub struct BenchTrainerArgs {
    /// Width.
    #[arg(long)]
    pub dim: Option<usize>,
    /// Decoder blocks.
    #[arg(long)]
    pub layers: Option<usize>,
    /// Attention heads.
    #[arg(long)]
    pub heads: Option<usize>,
    /// Key and value heads [default: as many as heads].
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// The output head is the embedding.
    #[arg(long)]
    pub tied: bool,
    /// Three standard shapes instead of one: small, large vocabulary, and that of SmolLM2-135M (some minutes).
    #[arg(long, conflicts_with_all = ["dim", "layers", "heads", "kv_heads", "tied", "ffn", "vocab", "seq", "batch"])]
    pub standard: bool,
    /// What products and attention compute in.
    #[arg(long, value_enum, default_value_t = BenchPrecision::Both)]
    pub precision: BenchPrecision,
    /// Inner width of the feed-forward.
    #[arg(long)]
    pub ffn: Option<usize>,
    /// Tokens in the vocabulary.
    #[arg(long)]
    pub vocab: Option<usize>,
    /// Tokens predicted per sequence.
    #[arg(long)]
    pub seq: Option<usize>,
    /// Sequences per step.
    #[arg(long)]
    pub batch: Option<usize>,
    /// Steps counted, after the warm-up.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub steps: u64,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Threads to compute with [default: all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Precisions to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchPrecision {
    /// Single precision.
    Fp32,
    /// Single precision, with factors of products in TF32 on CUDA devices.
    Tf32,
    /// bfloat16.
    Bf16,
    /// fp32 and bf16, one after the other.
    Both,
}

/// `murmur bench codec`.
#[derive(Debug, Args)]
pub struct BenchCodecArgs {
    /// Parameters of the synthetic pseudo-gradient.
    #[arg(long, default_value_t = 4_194_304, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub params: u64,
    /// Values kept per chunk of 4096.
    #[arg(long, default_value_t = 64)]
    pub k: usize,
    /// Contributions of a round that is summed and applied.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub contributions: u16,
    /// Also measure on a pseudo-gradient of a short training of the demo's model (half a minute).
    #[arg(long)]
    pub trained: bool,
    /// Threads to compute with [default: one, then all cores].
    #[arg(long, env = "MURMUR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur bench rounds`.
#[derive(Debug, Args)]
pub struct BenchRoundsArgs {
    /// The largest run to simulate.
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u16).range(4..=1000))]
    pub max_peers: u16,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur bench audits`.
#[derive(Debug, Args)]
pub struct BenchAuditsArgs {
    /// Runs of who is barred soonest; of who holds out longer, an eighth or a quarter of that.
    #[arg(long, default_value_t = 400, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub runs: u64,
    /// Auditors that a thousand contributions can expect, in place of the default's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub audit_permille: Option<u32>,
    /// One JSON array on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The text to continue.
    #[arg(required_unless_present = "ids")]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub source: ModelArgs,
    /// Token ids to continue instead of a text; the answer then is ids too.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', conflicts_with = "prompt")]
    pub ids: Vec<u32>,
    /// Tokens to add.
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub max_tokens: usize,
    /// Divides the scores; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8, value_name = "X")]
    pub temperature: f64,
    /// Only the likeliest so many tokens; 0 for all.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Above 1, makes what is there already less likely; 1.1 to 1.3 are usual.
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub repetition_penalty: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Write a proof of the answer, which `murmur audit` checks: the tokens, and 258 bytes of fingerprint for every 32 of them. A peer's is signed.
    #[arg(long, value_name = "FILE")]
    pub prove: Option<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "MURMUR_DEVICE", default_value = "auto")]
    pub device: String,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The text to read.
    pub text: Option<String>,
    #[command(flatten)]
    pub source: ModelArgs,
    /// Token ids to read instead of a text.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', conflicts_with = "text")]
    pub ids: Vec<u32>,
    /// How many of the likeliest next tokens to tell.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub top: usize,
    /// Multiple-choice questions to answer by likelihood: one JSON object a line, {"question": …, "choices": […], "answer": 0 or "A"}.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "ids"])]
    pub tasks: Option<PathBuf>,
    /// Write a proof of the result, which `murmur audit` checks: every input with its log likelihoods, under one root. A peer's is signed.
    #[arg(long, value_name = "FILE")]
    pub prove: Option<PathBuf>,
    /// With --prove, keep only N items, which the root draws: a smaller file, by which the total cannot be added up again.
    #[arg(long, requires = "prove", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub open: Option<u32>,
    /// With --json, every score at every place too (vocabulary times tokens).
    #[arg(long, requires = "json")]
    pub logits: bool,
    /// Without a text: how many held-out sequences to read.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub sequences: u64,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "MURMUR_DEVICE", default_value = "auto")]
    pub device: String,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `murmur export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub source: ModelArgs,
    /// The folder to write; must be new or empty.
    pub out: PathBuf,
}

/// `murmur wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    #[command(flatten)]
    pub dir: DirArg,
    /// What must hold: round, members, loss, val_loss or tokens, compared with >=, <=, >, < or ==. Give it again for more.
    #[arg(long, required = true, value_name = "CONDITION")]
    pub until: Vec<Condition>,
    /// Seconds after which to give up (exit code 1).
    #[arg(long, default_value_t = 3600.0, value_name = "SECS")]
    pub timeout: f64,
}

/// `murmur new`.
#[derive(Debug, Args)]
pub struct NewArgs {
    /// The run file.
    pub run: PathBuf,
    /// Change a value of the run file, such as timing.train_secs=10.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Create the run even if its audits and vesting are such that cheating pays.
    #[arg(long)]
    pub unsafe_economics: bool,
    /// Where this peer lives; must be new or empty [default: under the XDG data home, by run id].
    #[arg(long, env = "MURMUR_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    #[command(flatten)]
    pub peer: PeerOptions,
}

/// `murmur join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The ticket, from `murmur ticket`; may be left out for a directory that has joined before.
    pub ticket: Option<String>,
    /// Where this peer lives [default: under the XDG data home, by run id].
    #[arg(long, env = "MURMUR_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    #[command(flatten)]
    pub peer: PeerOptions,
}

/// `murmur train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run file.
    pub run: PathBuf,
    /// Change a value of the run file, such as timing.train_secs=10.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Where this peer lives; must be new or empty [default: under the XDG data home, by run id].
    #[arg(long, env = "MURMUR_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    #[command(flatten)]
    pub peer: PeerOptions,
}

/// `murmur peer`: one peer of the demo.
#[derive(Debug, Args)]
pub struct PeerArgs {
    /// Where it lives: a key, a run.toml and the data are there already.
    #[arg(long)]
    pub dir: PathBuf,
    /// Cheat, to be caught.
    #[arg(long, value_enum)]
    pub cheat: Option<Cheat>,
    #[command(flatten)]
    pub peer: PeerOptions,
}

/// `murmur sim`.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// The scenario [default: four peers, no faults].
    pub scenario: Option<PathBuf>,
    /// Seed of everything random [default: the scenario's].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Peers [default: the scenario's].
    #[arg(long, value_name = "N")]
    pub peers: Option<usize>,
    /// Rounds [default: the scenario's].
    #[arg(long, value_name = "N")]
    pub rounds: Option<u64>,
    /// Run this many seeds in a row, on all cores, and report the first that fails.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// Where to leave a failing run in its shortest form, as a scenario that repeats it.
    #[arg(long, value_name = "DIR")]
    pub regress: Option<PathBuf>,
    /// The report as one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
