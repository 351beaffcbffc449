//! The network over real loopback endpoints: no relay, ports chosen by the system, temporary directories.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::net::UdpSocket;
use std::time::Duration;

use bytes::Bytes;
use coordinatorless::net::{FetchError, Net, NetConfig, NetError, NetEvent, Relay, Request, Response, StatusInfo};
use coordinatorless::node::{LEAF_BYTES, leaf_count, leaf_ranges};
use coordinatorless::types::{Hash, PeerId, Round, RunId};
use coordinatorless::wire::{HEADER, MAX_RECORD, VERSION};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

const SOON: Duration = Duration::from_secs(10);
const RUN: RunId = RunId([42; 32]);

struct Peer {
    net: Net,
    events: mpsc::Receiver<NetEvent>,
    dir: TempDir,
}

fn config(seed: u8, dir: &TempDir) -> NetConfig {
    NetConfig {
        secret: [seed; 32],
        run: RUN,
        bind: Some(([127, 0, 0, 1], 0).into()),
        relay: Relay::None,
        dir: dir.path().to_owned(),
        max_upload: None,
        max_download: None,
        known: Vec::new(),
    }
}

impl Peer {
    async fn start(seed: u8) -> Self {
        Self::start_with(seed, |_| ()).await
    }

    async fn start_with(seed: u8, change: impl FnOnce(&mut NetConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(seed, &dir);
        change(&mut config);
        let (net, events) = Net::start(config).await.unwrap();
        Self { net, events, dir }
    }

    fn id(&self) -> PeerId {
        self.net.id()
    }

    async fn knows(&self, other: &Peer) {
        self.net.know(other.net.addr().await);
    }

    /// The next event that `pick` takes.
    async fn next<T>(&mut self, mut pick: impl FnMut(NetEvent) -> Option<T>) -> T {
        let found = timeout(SOON, async {
            loop {
                let event = self.events.recv().await.expect("the network runs");
                if let Some(found) = pick(event) {
                    return found;
                }
            }
        });
        found.await.expect("the event comes soon")
    }

    async fn frame(&mut self) -> (PeerId, Bytes) {
        self.next(|event| match event {
            NetEvent::Frame { from, bytes } => Some((from, bytes)),
            _ => None,
        })
        .await
    }

    async fn connected(&mut self, peer: PeerId) {
        self.next(|event| matches!(event, NetEvent::Connected(other) if other == peer).then_some(()))
            .await;
    }
}

/// Two peers that are members to each other.
async fn pair() -> (Peer, Peer) {
    pair_with(|_| ()).await
}

/// The same, the first of them configured otherwise.
async fn pair_with(change: impl FnOnce(&mut NetConfig)) -> (Peer, Peer) {
    let (mut a, mut b) = (Peer::start_with(1, change).await, Peer::start(2).await);
    a.knows(&b).await;
    b.knows(&a).await;
    a.net.set_members(vec![a.id(), b.id()]);
    b.net.set_members(vec![a.id(), b.id()]);
    let (a_id, b_id) = (a.id(), b.id());
    tokio::join!(a.connected(b_id), b.connected(a_id));
    (a, b)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_exchange_frames_in_order() {
    let (mut a, mut b) = pair().await;
    for i in 0..100u32 {
        a.net.broadcast(Bytes::copy_from_slice(&i.to_le_bytes()));
    }
    for i in 0..100u32 {
        assert_eq!(b.frame().await, (a.id(), Bytes::copy_from_slice(&i.to_le_bytes())));
    }
    let large = Bytes::from(vec![7; HEADER + MAX_RECORD]);
    b.net.send(a.id(), large.clone());
    assert_eq!(a.frame().await, (b.id(), large));
    let (sent, received) = a.net.traffic();
    assert!(sent > 400 && received > MAX_RECORD as u64, "{sent} {received}");
    a.net.shutdown().await;
    b.next(|event| matches!(event, NetEvent::Disconnected(_)).then_some(()))
        .await;
    b.net.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_just_before_shutting_down_arrives() {
    let (a, mut b) = pair().await;
    for i in 0..20u8 {
        a.net.broadcast(Bytes::from(vec![i; 100_000]));
    }
    a.net.shutdown().await;
    for i in 0..20u8 {
        assert_eq!(b.frame().await, (a.id(), Bytes::from(vec![i; 100_000])));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_comes_back_on_another_port_is_linked_again() {
    let (mut a, b) = pair().await;
    let (b_id, known, dir) = (b.id(), b.net.known(), b.dir);
    b.net.shutdown().await;
    drop(b.net);
    a.next(|event| matches!(event, NetEvent::Disconnected(_)).then_some(()))
        .await;
    // Without its note of the port that it had, it takes any.
    std::fs::remove_file(dir.path().join("port")).unwrap();
    let mut config = config(2, &dir);
    config.known = known;
    let (b_net, _events) = Net::start(config).await.unwrap();
    b_net.set_members(vec![a.id()]);
    a.connected(b_id).await;
    b_net.broadcast(Bytes::from_static(b"back"));
    assert_eq!(a.frame().await, (b_id, Bytes::from_static(b"back")));
    // The card with the address travels beside the frames: it comes soon, not first.
    let addr = b_net.addr().await;
    let learnt = async {
        while !a.net.known().contains(&addr) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(10), learnt).await.is_ok(),
        "the new address is learnt"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_another_run_is_not_understood() {
    let mut a = Peer::start(1).await;
    let b = Peer::start_with(2, |config| config.run = RunId([43; 32])).await;
    b.knows(&a).await;
    b.net.send(a.id(), Bytes::from_static(b"hello"));
    let asked = b.net.request(a.id(), Request::Status, Duration::from_secs(2)).await;
    assert!(
        matches!(asked, Err(NetError::Unreachable { .. } | NetError::Timeout { .. })),
        "{asked:?}"
    );
    assert!(a.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversized_frame_or_an_unknown_kind_is_refused_and_costs_the_link() {
    for (header, what) in [
        ([0xff, 0xff, 0xff, 0x7f, 0], "oversized"),
        ([1, 0, 0, 0, 9], "unknown kind"),
    ] {
        let mut a = Peer::start(1).await;
        let hostile = stranger(9).await;
        let alpn = format!("murmur/link/{VERSION}/{RUN}");
        let connection = hostile.connect(a.net.addr().await, alpn.as_bytes()).await.unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&header).await.unwrap();
        // The link may be gone before this is written: the header alone is enough to refuse it.
        let _ = stream.write_all(&[0; 100]).await;
        let (from, reason) = a
            .next(|event| match event {
                NetEvent::Rejected {
                    from,
                    kind: "frame",
                    reason,
                } => Some((from, reason)),
                _ => None,
            })
            .await;
        assert_eq!(from.0, *hostile.id().as_bytes());
        assert!(reason.starts_with(what), "{reason}");
        timeout(SOON, connection.closed()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_gets_its_answer_and_silence_is_unknown() {
    let (a, mut b) = pair().await;
    let status = StatusInfo {
        run: RUN,
        branch: 1,
        round: Round(8),
        tip: Hash([5; 32]),
        tip_round: Round(7),
    };
    let asked = a.id();
    let answering = tokio::spawn(async move {
        for answer in [true, false] {
            let (from, request, reply) = b
                .next(|event| match event {
                    NetEvent::Request { from, request, reply } => Some((from, request, reply)),
                    _ => None,
                })
                .await;
            assert_eq!((from, request), (asked, Request::Status));
            if answer {
                reply.send(Response::Status(status)).unwrap();
            }
        }
        b
    });
    let peer = coordinatorless::wire::Keys::new([2; 32], coordinatorless::wire::Scheme::Ed25519).id();
    let ask = || a.net.request(peer, Request::Status, SOON);
    assert_eq!(ask().await.unwrap(), Response::Status(status));
    assert_eq!(ask().await.unwrap(), Response::Unknown);
    let b = answering.await.unwrap();
    let unknown = a.net.request(
        PeerId(*iroh::SecretKey::from_bytes(&[77; 32]).public().as_bytes()),
        Request::Status,
        SOON,
    );
    assert!(matches!(unknown.await, Err(NetError::Unreachable { .. })));
    drop(b);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_is_fetched_from_the_second_provider_when_the_first_is_gone() {
    let (a, b) = (Peer::start(1).await, Peer::start(2).await);
    let gone = Peer::start(3).await;
    a.knows(&b).await;
    a.knows(&gone).await;
    let blob = Bytes::from((0..3_000_000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let hash = b.net.put(blob.clone()).await.unwrap();
    assert_eq!(hash, Hash::of(&blob));
    let gone_id = gone.id();
    gone.net.shutdown().await;
    assert!(!a.net.has(hash).await);
    let start = Instant::now();
    a.net
        .fetch(hash, blob.len() as u64, vec![gone_id, b.id()], SOON)
        .await
        .unwrap();
    println!("12 MB from the second provider after {:?}", start.elapsed());
    assert_eq!(a.net.get(hash).await.unwrap().unwrap(), blob);
    assert_eq!(a.net.counters().fetches.failed_providers, 1);
    assert!(a.net.disk_bytes().await >= blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_drips_leaves_time_for_the_next() {
    let (a, other) = (Peer::start(1).await, Peer::start(3).await);
    let drips = Peer::start_with(2, |config| config.max_upload = Some(50_000)).await;
    a.knows(&drips).await;
    a.knows(&other).await;
    let blob = Bytes::from(vec![9; 3_000_000]);
    let hash = drips.net.put(blob.clone()).await.unwrap();
    other.net.put(blob.clone()).await.unwrap();
    let (len, providers) = (blob.len() as u64, vec![drips.id(), other.id()]);
    // Alone it would take a minute.
    a.net
        .fetch(hash, len, providers, Duration::from_secs(15))
        .await
        .unwrap();
    assert_eq!(a.net.get(hash).await.unwrap().unwrap(), blob);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_longer_than_promised_is_refused_before_it_is_taken() {
    let (a, b) = (Peer::start(1).await, Peer::start(2).await);
    a.knows(&b).await;
    let blob = Bytes::from(vec![9; 2_000_000]);
    let hash = b.net.put(blob).await.unwrap();
    let refused = a.net.fetch(hash, 1_999_999, vec![b.id()], SOON).await;
    assert!(
        matches!(
            refused,
            Err(FetchError::TooLong {
                expected: 1_999_999,
                found: 2_000_000,
                ..
            })
        ),
        "{refused:?}"
    );
    assert!(a.net.traffic().1 < 200_000, "only the beginning came");
    let absent = a.net.fetch(Hash::of(b"nobody has this"), 100, vec![b.id()], SOON).await;
    assert!(matches!(absent, Err(FetchError::NotFound { .. })), "{absent:?}");
    assert_eq!(a.net.get(hash).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_upload_cap_holds() {
    let a = Peer::start(1).await;
    let b = Peer::start_with(2, |config| config.max_upload = Some(1_000_000)).await;
    a.knows(&b).await;
    let hash = b.net.put(Bytes::from(vec![9; 1_500_000])).await.unwrap();
    let start = Instant::now();
    a.net.fetch(hash, 1_500_000, vec![b.id()], SOON).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(1100), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_is_served_where_it_lies() {
    let (a, b) = (Peer::start(1).await, Peer::start(2).await);
    a.knows(&b).await;
    let file = b.dir.path().join("snapshot");
    std::fs::write(&file, vec![3; 5_000_000]).unwrap();
    let hash = b.net.put_file(&file).await.unwrap();
    assert!(b.net.disk_bytes().await < 4_000_000, "not copied");
    a.net.fetch(hash, 5_000_000, vec![b.id()], SOON).await.unwrap();
    assert_eq!(a.net.get(hash).await.unwrap().unwrap(), vec![3; 5_000_000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_are_there_after_a_restart() {
    let a = Peer::start(1).await;
    let hash = a.net.put(Bytes::from(vec![4; 100_000])).await.unwrap();
    a.net.retain(HashSet::from([hash]));
    a.net.shutdown().await;
    let (a_net, _events) = Net::start(config(1, &a.dir)).await.unwrap();
    assert_eq!(a_net.get(hash).await.unwrap().unwrap(), vec![4; 100_000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_announcement_arrives_through_a_third_peer() {
    let (a, b, mut c) = (Peer::start(1).await, Peer::start(2).await, Peer::start(3).await);
    a.knows(&b).await;
    c.knows(&b).await;
    a.net.set_members(vec![b.id()]);
    c.net.set_members(vec![b.id()]);
    b.net.set_members(vec![b.id()]);
    let announcer = a.net.clone();
    let repeating = tokio::spawn(async move {
        loop {
            announcer.announce(Bytes::from_static(b"a newcomer"));
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    assert_eq!(c.frame().await.1, Bytes::from_static(b"a newcomer"));
    repeating.abort();
    assert!(
        !a.net.announce(Bytes::from(vec![0; 65 << 10])),
        "too long for an announcement"
    );
    // Addresses spread by themselves: `c` can now reach `a`, of which nobody told it.
    let a_id = a.id();
    timeout(SOON, async {
        while !c.net.known().iter().any(|addr| *addr.id.as_bytes() == a_id.0) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_is_taken_is_named() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = NetConfig {
        bind: Some(taken.local_addr().unwrap()),
        ..config(1, &dir)
    };
    let error = Net::start(config).await.unwrap_err();
    assert!(matches!(error, NetError::PortTaken { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&taken.local_addr().unwrap().port().to_string())
    );
}

/// Takes the port that a peer wrote down, as soon as it is free.
async fn port_of(dir: &TempDir) -> UdpSocket {
    let port: u16 = std::fs::read_to_string(dir.path().join("port"))
        .unwrap()
        .parse()
        .unwrap();
    let free = async {
        loop {
            if let Ok(socket) = UdpSocket::bind(("127.0.0.1", port)) {
                return socket;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, free).await.expect("the port is let go")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_was_not_given_a_port_comes_back_where_it_was_and_elsewhere_if_that_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mut ports = Vec::new();
    for _ in 0..2 {
        let (net, _events) = Net::start(config(1, &dir)).await.unwrap();
        ports.push(net.addr().await);
        net.shutdown().await;
        drop(net);
        // The socket closes when the last task that has it ends: a new process would not have to wait for that.
        drop(port_of(&dir).await);
    }
    assert_eq!(ports[0], ports[1]);
    let _other = port_of(&dir).await;
    let (net, _events) = Net::start(config(1, &dir)).await.unwrap();
    let elsewhere = net.addr().await;
    assert!(elsewhere != ports[0] && elsewhere.ip_addrs().next().is_some());
    net.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_no_url_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = NetConfig {
        relay: Relay::Url("not a url".into()),
        ..config(1, &dir)
    };
    assert!(matches!(Net::start(config).await, Err(NetError::BadRelay { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_nothing_does_not_hold_up_the_others() {
    let (a, mut b) = pair().await;
    let c = Peer::start(3).await;
    a.knows(&c).await;
    a.net.set_members(vec![b.id(), c.id()]);
    timeout(SOON, async {
        while a.net.connected().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    // `c` reads no events; 40 MB are more than its window, its events and its queue hold.
    let frame = Bytes::from(vec![1; 1 << 20]);
    for _ in 0..40 {
        a.net.broadcast(frame.clone());
        assert_eq!(b.frame().await.1, frame);
    }
    drop(c);
}

/// A stranger with a key of its own, and none of our code.
async fn stranger(seed: u8) -> iroh::Endpoint {
    let builder = iroh::Endpoint::builder(iroh::endpoint::presets::Minimal).relay_mode(iroh::RelayMode::Disabled);
    let secret = iroh::SecretKey::from_bytes(&[seed; 32]);
    builder.secret_key(secret).bind().await.unwrap()
}

/// Connections of so many strangers, eight each, over all protocols. All but the first of each stranger dribble a byte every second.
async fn dribblers(to: &Peer, count: u8) -> (Vec<iroh::Endpoint>, Vec<iroh::endpoint::Connection>) {
    let addr = to.net.addr().await;
    let alpn = |protocol: &str| format!("murmur/{protocol}/{VERSION}/{RUN}").into_bytes();
    let alpns = [
        alpn("link"),
        alpn("sync"),
        iroh_blobs::ALPN.to_vec(),
        iroh_gossip::ALPN.to_vec(),
    ];
    let (mut endpoints, mut silent) = (Vec::new(), Vec::new());
    for seed in 0..count {
        let endpoint = stranger(100 + seed).await;
        for i in 0..8 {
            let connection = endpoint.connect(addr.clone(), &alpns[i % 4]).await.unwrap();
            if i == 0 {
                silent.push(connection);
                continue;
            }
            tokio::spawn(async move {
                let mut stream = match i % 4 {
                    1 | 2 => connection.open_bi().await.map(|(send, _)| send),
                    _ => connection.open_uni().await,
                }?;
                while stream.write_all(&[1]).await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Ok::<(), iroh::endpoint::ConnectionError>(())
            });
        }
        endpoints.push(endpoint);
    }
    (endpoints, silent)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_dribble_or_say_nothing_keep_nobody_out_and_are_bounded() {
    let (mut a, b) = pair_with(|config| config.max_upload = Some(200_000)).await;
    // Twenty times eight: more than there is room for.
    let (_endpoints, silent) = dribblers(&a, 20).await;
    let strangers = a.net.counters().strangers;
    assert!((100..=128).contains(&strangers), "{strangers}");

    // Members go on.
    b.net.broadcast(Bytes::from_static(b"a member"));
    assert_eq!(a.frame().await, (b.id(), Bytes::from_static(b"a member")));
    // A newcomer, a stranger too, is heard and answered.
    let c = Peer::start(3).await;
    c.knows(&a).await;
    c.net.send(a.id(), Bytes::from_static(b"a newcomer"));
    assert_eq!(a.frame().await, (c.id(), Bytes::from_static(b"a newcomer")));
    let (asking, to) = (c.net.clone(), a.id());
    let asked = tokio::spawn(async move { asking.request(to, Request::RunConfig, SOON).await });
    let reply = a.next(|event| match event {
        NetEvent::Request {
            from,
            request: Request::RunConfig,
            reply,
        } => Some((from, reply)),
        _ => None,
    });
    let (from, reply) = reply.await;
    assert_eq!(from, c.id());
    reply.send(Response::RunConfig(vec![7])).unwrap();
    assert_eq!(asked.await.unwrap().unwrap(), Response::RunConfig(vec![7]));

    // Nor is it sent away for saying nothing while it takes in what it asked for.
    let begun = Instant::now();
    let blob = Bytes::from(vec![7; 4_500_000]);
    let (hash, len, from) = (a.net.put(blob.clone()).await.unwrap(), blob.len() as u64, vec![a.id()]);
    let taking = c.net.clone();
    let taken = tokio::spawn(async move { taking.fetch(hash, len, from, 4 * SOON).await });

    // Whoever says nothing at all is sent away; nobody else makes room for long.
    for connection in &silent {
        timeout(Duration::from_secs(30), connection.closed())
            .await
            .expect("the silent are closed");
    }
    println!(
        "{strangers} strangers at once; the last silent one was closed after {:?}",
        begun.elapsed()
    );
    assert!(a.net.counters().strangers <= 128);
    taken.await.unwrap().unwrap();
    let secs = begun.elapsed().as_secs();
    assert!(secs >= 21, "longer than anyone may be silent: {secs} s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_questions_at_once_share_one_connection() {
    let mut a = Peer::start(1).await;
    let c = Peer::start(3).await;
    c.knows(&a).await;
    assert!(c.net.reached().is_empty());
    // As many as one peer may have in work.
    let ask = || c.net.request(a.id(), Request::Status, SOON);
    let asked = futures::future::join_all((0..4).map(|_| ask()));
    let answered = async {
        for _ in 0..4 {
            a.next(|event| match event {
                NetEvent::Request { reply, .. } => reply.send(Response::Unknown).ok(),
                _ => None,
            })
            .await;
        }
    };
    let (answers, ()) = tokio::join!(asked, answered);
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(a.net.counters().strangers, 1);
    // Who answered is reached, though neither keeps a link to the other.
    assert_eq!(Vec::from_iter(c.net.reached()), [a.id()]);
    assert!(c.net.connected().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stranger_sends_and_nobody_reads_is_bounded() {
    let a = Peer::start(1).await;
    let hostile = stranger(9).await;
    let alpn = format!("murmur/link/{VERSION}/{RUN}");
    let connection = hostile.connect(a.net.addr().await, alpn.as_bytes()).await.unwrap();
    // The first stream is read, as far as it goes; the others wait for it.
    let mut first = connection.open_uni().await.unwrap();
    first.write_all(&[1]).await.unwrap();
    let mut sent = 0;
    let mut streams = Vec::new();
    while let Ok(Ok(mut stream)) = timeout(Duration::from_secs(1), connection.open_uni()).await {
        while let Ok(Ok(bytes)) = timeout(Duration::from_secs(1), stream.write(&[0; 65536])).await {
            sent += bytes;
        }
        streams.push(stream);
        if streams.len() == 4 {
            break;
        }
    }
    println!("{sent} bytes went through unread");
    assert!((500_000..1_300_000).contains(&sent), "{sent}");
}

/// A blob of so many pieces of 4 MiB, no two alike.
fn pieces(count: u32) -> Bytes {
    Bytes::from((0..count << 20).flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_blob_comes_from_all_who_have_it_at_once() {
    let (a, without) = (Peer::start(1).await, Peer::start(2).await);
    let blob = pieces(6);
    let mut providers = vec![without.id()];
    a.knows(&without).await;
    let mut three = Vec::new();
    for seed in 3..6 {
        let peer = Peer::start_with(seed, |config| config.max_upload = Some(4_000_000)).await;
        a.knows(&peer).await;
        providers.push(peer.id());
        peer.net.put(blob.clone()).await.unwrap();
        three.push(peer);
    }
    let begun = Instant::now();
    a.net
        .fetch(Hash::of(&blob), blob.len() as u64, providers, 3 * SOON)
        .await
        .unwrap();
    let sent: Vec<u64> = three.iter().map(|peer| peer.net.traffic().0).collect();
    println!("25 MB in {:?}, of which {sent:?} from each", begun.elapsed());
    assert_eq!(a.net.get(Hash::of(&blob)).await.unwrap().unwrap(), blob);
    // Each serves one piece at a time at the same rate, so nobody carries it alone.
    assert!(
        sent.iter().all(|sent| (4_000_000..17_000_000).contains(sent)),
        "{sent:?}"
    );
    assert!(a.net.counters().fetches.bytes < 26_500_000, "nothing came twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_leaves_of_a_long_blob_come_with_their_proof_and_can_be_handed_on() {
    let (author, auditor, other) = (Peer::start(1).await, Peer::start(2).await, Peer::start(3).await);
    auditor.knows(&author).await;
    other.knows(&auditor).await;
    let blob = pieces(6);
    let (hash, len) = (Hash::of(&blob), blob.len() as u64);
    author.net.put(blob.clone()).await.unwrap();
    // Three leaves of 1536, the last one among them.
    let ranges = leaf_ranges(&[7, 900, leaf_count(len) - 1], len);
    let proof = auditor.net.fetch_ranges(hash, len, &ranges, &[author.id()], SOON).await;
    let proof = proof.unwrap();
    let (fetched, leaves) = (auditor.net.counters().fetches.bytes, 3 * LEAF_BYTES);
    println!(
        "3 leaves of {len} bytes: {} bytes of proof, {fetched} fetched",
        proof.len()
    );
    // A path of eleven hash pairs to each, at most.
    assert!(
        (leaves..leaves + 3 * 11 * 64 + 9).contains(&(proof.len() as u64)),
        "{}",
        proof.len()
    );
    assert!(fetched < 2 * leaves, "{fetched}");
    for leaf in [7, 900] {
        let at = leaf * LEAF_BYTES as usize;
        let bytes = &blob[at..at + LEAF_BYTES as usize];
        assert!(proof.windows(bytes.len()).any(|window| window == bytes), "leaf {leaf}");
    }
    // Whoever holds no more than that hands it on, and asks nobody for it again.
    let again = other.net.fetch_ranges(hash, len, &ranges, &[auditor.id()], SOON).await;
    assert_eq!(again.unwrap(), proof);
    assert_eq!(
        auditor.net.fetch_ranges(hash, len, &ranges, &[], SOON).await.unwrap(),
        proof
    );
    assert_eq!(auditor.net.counters().fetches.bytes, fetched);
    // Another length than the one that is known, or leaves that nobody has, give nothing.
    let short = other
        .net
        .fetch_ranges(hash, len - 1, &leaf_ranges(&[0], len), &[auditor.id()], SOON)
        .await;
    assert!(short.unwrap_err().to_string().contains("expected 25165823"));
    let more = leaf_ranges(&[8], len);
    assert!(
        other
            .net
            .fetch_ranges(hash, len, &more, &[auditor.id()], SOON)
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_fetch_that_a_restart_cut_off_takes_up_where_it_was() {
    let slow = |config: &mut NetConfig| config.max_upload = Some(4_000_000);
    let (b, c) = (Peer::start_with(2, slow).await, Peer::start_with(3, slow).await);
    let blob = pieces(6);
    let (hash, len) = (Hash::of(&blob), blob.len() as u64);
    for peer in [&b, &c] {
        peer.net.put(blob.clone()).await.unwrap();
    }
    let a = Peer::start(1).await;
    let providers = vec![b.id(), c.id()];
    a.knows(&b).await;
    a.knows(&c).await;
    let cut = a
        .net
        .fetch(hash, len, providers.clone(), Duration::from_millis(1500))
        .await;
    assert!(matches!(cut, Err(FetchError::Timeout { .. })), "{cut:?}");
    let before = a.net.counters().fetches.bytes;
    let known = a.net.known();
    a.net.shutdown().await;
    let again = NetConfig {
        known,
        ..config(1, &a.dir)
    };
    let (net, _events) = Net::start(again).await.unwrap();
    net.fetch(hash, len, providers, 3 * SOON).await.unwrap();
    assert_eq!(net.get(hash).await.unwrap().unwrap(), blob);
    let after = net.counters().fetches.bytes;
    println!("{before} bytes before the restart, {after} after it, of {len}");
    assert!(before > 1_000_000 && before + after < len + len / 8, "{before} {after}");
}
