//! A bounded queue of frames for one peer: when it is full the oldest go, so that a slow peer costs nobody but itself.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

/// Most frames waiting.
pub(super) const MAX_FRAMES: usize = 1024;
/// Most bytes waiting.
pub(super) const MAX_BYTES: usize = 16 << 20;

/// What a frame on a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// For the driver: a signed message.
    Message = 0,
    /// For the address book.
    Card = 1,
}

/// The queue; any number of writers, one reader at a time.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<(Kind, Bytes)>,
    bytes: usize,
}

impl Waiting {
    fn pop(&mut self) -> Option<(Kind, Bytes)> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.1.len();
        Some(frame)
    }
}

impl Queue {
    /// Adds a frame and says how many of the oldest had to go for it.
    pub fn push(&self, kind: Kind, frame: Bytes) -> u64 {
        let mut waiting = self.waiting();
        waiting.bytes += frame.len();
        waiting.frames.push_back((kind, frame));
        let mut dropped = 0;
        while waiting.frames.len() > MAX_FRAMES || (waiting.bytes > MAX_BYTES && waiting.frames.len() > 1) {
            waiting.pop();
            dropped += 1;
        }
        drop(waiting);
        self.filled.notify_one();
        dropped
    }

    /// The oldest frame, as soon as there is one. Cancelling the wait loses nothing.
    pub async fn pop(&self) -> (Kind, Bytes) {
        loop {
            if let Some(frame) = self.try_pop() {
                return frame;
            }
            self.filled.notified().await;
        }
    }

    /// The oldest frame, if there is one.
    pub fn try_pop(&self) -> Option<(Kind, Bytes)> {
        self.waiting().pop()
    }

    /// Drops everything.
    pub fn clear(&self) {
        *self.waiting() = Waiting::default();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_frames_go_when_too_many_wait() {
        let queue = Queue::default();
        let dropped: u64 = (0..MAX_FRAMES + 3)
            .map(|i| queue.push(Kind::Message, Bytes::from(i.to_string())))
            .sum();
        assert_eq!(dropped, 3);
        assert_eq!(queue.pop().await, (Kind::Message, Bytes::from_static(b"3")));
    }

    #[tokio::test]
    async fn the_oldest_frames_go_when_too_much_waits() {
        let queue = Queue::default();
        let big = Bytes::from(vec![0; MAX_BYTES / 4]);
        let dropped: u64 = (0..6).map(|_| queue.push(Kind::Message, big.clone())).sum();
        assert_eq!(dropped, 2);
    }
}
