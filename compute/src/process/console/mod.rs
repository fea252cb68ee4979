//! The guest's serial console: recent output, and everybody who watches or types, also over a move.
//!
//! | module | |
//! |---|---|
//! | [`line`] | positions of output, counts of keys, what travels with the machine |
//! | [`wire`] | what client and process say to each other |
//!
//! The guest never waits for a watcher: each reads from what is kept at its own pace, and one that falls behind more than that is
//! told so by the positions. Keys wait for the guest, however long. Between the saving of the state and the guest's going on no keys
//! are taken, so that a key is either in the saved state or still the client's.
//! Lives here: sockets and threads of the console. Never enters: what the bytes mean, terminals.

pub mod line;
pub mod wire;

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vmove_devices::{
    ConsoleSink,
    state::{Section, StateError},
};

use line::{Output, Saved, Typists};
use wire::{ClientId, ClientMsg, Decoder, MAX_KEYS, MAX_OUTPUT, MAX_TEXT, RunId, ServerMsg, VERSION};

/// The section of the saved state.
pub const SECTION: &str = "console";
const SECTION_VERSION: u16 = 1;
/// Connections at once.
const MAX_WATCHERS: usize = 64;
/// How long a new connection may take to say what it wants.
const GREETING: Duration = Duration::from_secs(10);
/// How often a watcher is told that its connection lives.
const ALIVE: Duration = Duration::from_secs(5);
/// A guest says one byte at a time: what comes within this time goes out together.
const GATHER: Duration = Duration::from_millis(2);
/// How often keys that had no room are offered again.
const OFFER: Duration = Duration::from_millis(5);
/// How long a watcher may read nothing before it is let go; it attaches again where it was.
const STALLED: Duration = Duration::from_secs(30);
/// How long watchers may take to hear the last word.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the guest says. Its lock is held on the vCPU's way, so only to copy bytes.
#[derive(Default)]
struct Screen {
    /// None while the guest has not arrived.
    output: Option<Output>,
    farewell: Option<ServerMsg>,
    /// Threads that wait for news.
    waiting: usize,
    watchers: usize,
}

/// What is typed. Taken before the lock of the serial port, and that before [`Screen`]'s.
#[derive(Default)]
struct Keys {
    typists: Typists,
    /// The state has been saved: what is typed now is for whoever has that state.
    held: bool,
}

#[derive(Default)]
struct Inner {
    screen: Mutex<Screen>,
    news: Condvar,
    keys: Mutex<Keys>,
}

/// The console of one VM process.
#[derive(Clone, Default)]
pub struct Console(Arc<Inner>);

impl Console {
    /// Of a guest that starts here.
    pub fn new(run: RunId) -> Self {
        let console = Self::default();
        console.screen().output = Some(Output::new(run));
        console
    }

    /// Of a guest that arrives: watchers wait for [`restore`](Self::restore).
    pub fn arriving() -> Self {
        Self::default()
    }

    /// Where the guest's serial port writes to.
    pub fn sink(&self) -> ConsoleSink {
        Arc::new(Mutex::new(self.clone()))
    }

    /// Both directions as a section of the saved state. From now on no keys are taken, until [`go_on`](Self::go_on).
    pub fn save(&self) -> Result<Section, StateError> {
        let mut keys = self.keys();
        keys.held = true;
        let screen = self.screen();
        // A guest whose state can be saved is here.
        let missing = || StateError::Missing(SECTION.to_owned());
        let saved = Saved::of(screen.output.as_ref().ok_or_else(missing)?, &keys.typists);
        Section::encode(SECTION, SECTION_VERSION, &saved)
    }

    /// The guest goes on here after [`save`](Self::save).
    pub fn go_on(&self) {
        self.keys().held = false;
    }

    /// Takes the console's section out of a saved state (untrusted) and goes on from it.
    pub fn restore(&self, sections: &mut Vec<Section>) -> Result<(), String> {
        let index = sections.iter().position(|section| section.name == SECTION);
        let section = sections.swap_remove(index.ok_or("the saved state has no console")?);
        let saved: Saved = section.decode(SECTION_VERSION).map_err(|e| e.to_string())?;
        let (output, typists) = saved.restore().map_err(|e| format!("the console's state: {e}"))?;
        self.keys().typists = typists;
        self.screen().output = Some(output);
        self.0.news.notify_all();
        Ok(())
    }

    /// What comes from now on is another life of the guest: it was restored from a checkpoint. Who watched the one before is told so,
    /// and counts of its keys mean nothing here.
    pub fn begin_run(&self, run: RunId) {
        self.keys().typists = Typists::default();
        if let Some(output) = &mut self.screen().output {
            output.begin_run(run);
        }
    }

    /// Tells all watchers the last word, behind all output, and gives them a moment to hear it.
    pub fn end(&self, farewell: ServerMsg) {
        let mut screen = self.screen();
        screen.farewell = Some(farewell);
        self.0.news.notify_all();
        let end = Instant::now() + FAREWELL;
        while screen.watchers > 0 && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            screen = self.wait(screen, left);
        }
    }

    /// Serves the console on a socket in the VM's directory. `feed` gives keys to the guest and says how many it took.
    pub fn serve(
        &self,
        path: &Path,
        feed: impl Fn(&[u8]) -> usize + Send + Sync + 'static,
    ) -> io::Result<()> {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        let (console, feed) = (self.clone(), Arc::new(feed));
        thread::Builder::new().name("console".into()).spawn(move || {
            for stream in listener.incoming() {
                let (console, feed) = (console.clone(), Arc::clone(&feed));
                let spawned = stream.and_then(|stream| {
                    thread::Builder::new().name("console-in".into()).spawn(move || {
                        if let Err(error) = console.attend(stream, &*feed) {
                            tracing::debug!(%error, "console connection");
                        }
                    })
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "console watcher");
                }
            }
        })?;
        Ok(())
    }

    /// One connection: greets it, starts the thread that tells it of output, and takes its keys.
    fn attend(&self, mut stream: UnixStream, feed: &impl Fn(&[u8]) -> usize) -> io::Result<()> {
        stream.set_write_timeout(Some(STALLED))?;
        let watcher = Arc::new(Watcher::new(stream.try_clone()?));
        let Some(counted) = Counted::new(self) else {
            return watcher.refuse(format!("{MAX_WATCHERS} connections to this console are the most"));
        };
        let mut decoder = Decoder::default();
        stream.set_read_timeout(Some(GREETING))?;
        let (client, seen) = match receive(&mut stream, &mut decoder)? {
            Some(ClientMsg::Attach { version: VERSION, client, seen }) => (client, seen),
            Some(ClientMsg::Attach { version, .. }) => {
                return watcher.refuse(format!(
                    "this VM's process speaks version {VERSION} of the console, not {version}"
                ));
            }
            Some(ClientMsg::Keys { .. }) => return watcher.refuse("keys before attaching".into()),
            None => return Ok(()),
        };
        stream.set_read_timeout(None)?;
        let (console, told, _counted) = (self.clone(), Arc::clone(&watcher), Arc::clone(&counted));
        thread::Builder::new().name("console-out".into()).spawn(move || {
            let _counted = counted;
            if let Err(error) = console.tell(&told, client, seen) {
                tracing::debug!(%error, "console watcher");
            }
            told.leave();
        })?;
        let ended = self.listen(&mut stream, &mut decoder, client, &watcher, feed);
        if ended.is_err() {
            watcher.leave();
        }
        ended
    }

    /// Takes keys until the client has no more to say; it may watch on.
    fn listen(
        &self,
        stream: &mut UnixStream,
        decoder: &mut Decoder,
        client: ClientId,
        watcher: &Watcher,
        feed: &impl Fn(&[u8]) -> usize,
    ) -> io::Result<()> {
        while let Some(message) = receive(stream, decoder)? {
            match message {
                ClientMsg::Keys { at, bytes } if bytes.len() <= MAX_KEYS => {
                    match self.type_in(client, at, &bytes, watcher, feed) {
                        Some(count) => watcher.send(&ServerMsg::Taken { count })?,
                        None => return Ok(()),
                    }
                }
                _ => return watcher.refuse("a message out of turn, or too many keys at once".into()),
            }
        }
        Ok(())
    }

    /// Gives keys to the guest, those that it has not been given before. Waits for room, and for a guest that arrives or whose
    /// state has just been saved. None if the client has gone before.
    fn type_in(
        &self,
        client: ClientId,
        at: u64,
        bytes: &[u8],
        watcher: &Watcher,
        feed: &impl Fn(&[u8]) -> usize,
    ) -> Option<u64> {
        let end = at.saturating_add(bytes.len() as u64);
        loop {
            {
                let mut keys = self.keys();
                if !keys.held {
                    let fresh = keys.typists.fresh(client, at, bytes);
                    let left = fresh.len() - feed(fresh);
                    keys.typists.took(client, end - left as u64);
                    if left == 0 {
                        return keys.typists.taken(client);
                    }
                }
            }
            if watcher.gone.load(Ordering::SeqCst) {
                return None;
            }
            thread::sleep(OFFER);
        }
    }

    /// Tells a watcher of all output from where it was, until it has gone or the last word is said.
    fn tell(&self, watcher: &Watcher, client: ClientId, seen: Option<(RunId, u64)>) -> Result<(), io::Error> {
        let (run, mut at, end) = loop {
            let screen = self.screen();
            if let Some(output) = &screen.output {
                break (output.run(), output.start(seen), output.end());
            }
            if let Some(farewell) = screen.farewell.clone() {
                drop(screen);
                return watcher.send(&farewell);
            }
            drop(self.wait(screen, ALIVE));
            watcher.send(&ServerMsg::Alive)?;
        };
        let taken = self.keys().typists.taken(client);
        watcher.send(&ServerMsg::Attached { run, at, end, taken })?;
        loop {
            let message = {
                let mut screen = self.screen();
                if screen.has_nothing_behind(at) {
                    drop(self.wait(screen, ALIVE));
                    thread::sleep(GATHER);
                    screen = self.screen();
                }
                match (&screen.output, &screen.farewell) {
                    (Some(output), _) if output.end() > at => {
                        let (from, bytes) = output.read(at, MAX_OUTPUT);
                        at = from + bytes.len() as u64;
                        ServerMsg::Output { at: from, bytes }
                    }
                    (_, Some(farewell)) => {
                        let farewell = farewell.clone();
                        drop(screen);
                        return watcher.send(&farewell);
                    }
                    _ => ServerMsg::Alive,
                }
            };
            watcher.send(&message)?;
        }
    }

    fn wait<'a>(&self, mut screen: MutexGuard<'a, Screen>, most: Duration) -> MutexGuard<'a, Screen> {
        screen.waiting += 1;
        let (mut screen, _) = self.0.news.wait_timeout(screen, most).unwrap_or_else(PoisonError::into_inner);
        screen.waiting -= 1;
        screen
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.0.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.0.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Screen {
    fn has_nothing_behind(&self, at: u64) -> bool {
        self.farewell.is_none() && self.output.as_ref().is_none_or(|output| output.end() <= at)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut screen = self.screen();
        if let Some(output) = &mut screen.output {
            output.push(bytes);
        }
        // Waking nobody still costs a call of the kernel.
        if screen.waiting > 0 {
            self.0.news.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection as both its threads know it.
struct Watcher {
    socket: UnixStream,
    /// Held for one message.
    sending: Mutex<()>,
    gone: AtomicBool,
}

impl Watcher {
    fn new(socket: UnixStream) -> Self {
        Self { socket, sending: Mutex::new(()), gone: AtomicBool::new(false) }
    }

    fn send(&self, message: &ServerMsg) -> io::Result<()> {
        let frame = wire::encode(message).map_err(io::Error::other)?;
        let _one = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.socket).write_all(&frame)
    }

    fn refuse(&self, mut reason: String) -> io::Result<()> {
        reason.truncate(MAX_TEXT);
        let said = self.send(&ServerMsg::Refused { reason });
        self.leave();
        said
    }

    fn leave(&self) {
        self.gone.store(true, Ordering::SeqCst);
        // It may have closed its end already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A connection that is served, as long as one of its threads lives.
struct Counted(Console);

impl Counted {
    /// None when there are as many as may be.
    fn new(console: &Console) -> Option<Arc<Self>> {
        let mut screen = console.screen();
        if screen.watchers >= MAX_WATCHERS {
            return None;
        }
        screen.watchers += 1;
        Some(Arc::new(Self(console.clone())))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.screen().watchers -= 1;
        self.0.0.news.notify_all();
    }
}

/// The next message of a client; none at the end of what it says.
fn receive(stream: &mut UnixStream, decoder: &mut Decoder) -> io::Result<Option<ClientMsg>> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(message) = decoder.take().map_err(io::Error::other)? {
            return Ok(Some(message));
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(None),
            n => decoder.push(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const RUN: RunId = [7; 16];

    /// A client's connection.
    struct Client(UnixStream, Decoder);

    impl Client {
        fn attach(path: &Path, client: u8, seen: Option<(RunId, u64)>) -> Self {
            let mut this = Self(UnixStream::connect(path).unwrap(), Decoder::default());
            this.say(&ClientMsg::Attach { version: VERSION, client: [client; 16], seen });
            this
        }

        fn say(&mut self, message: &ClientMsg) {
            self.0.write_all(&wire::encode(message).unwrap()).unwrap();
        }

        fn hear(&mut self) -> ServerMsg {
            loop {
                match self.1.take().unwrap() {
                    Some(ServerMsg::Alive) => {}
                    Some(message) => return message,
                    None => {
                        let mut buffer = [0; 100];
                        let n = self.0.read(&mut buffer).unwrap();
                        assert!(n > 0, "the connection was closed");
                        self.1.push(&buffer[..n]);
                    }
                }
            }
        }

        fn output(&mut self, length: usize) -> (u64, Vec<u8>) {
            let (mut from, mut got) = (None, Vec::new());
            while got.len() < length {
                let ServerMsg::Output { at, bytes } = self.hear() else { panic!("no output") };
                assert_eq!(at, from.unwrap_or(at) + got.len() as u64);
                from.get_or_insert(at);
                got.extend(bytes);
            }
            (from.unwrap(), got)
        }
    }

    fn serve(console: &Console, feed: impl Fn(&[u8]) -> usize + Send + Sync + 'static) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        console.serve(&dir.path().join("c"), feed).unwrap();
        dir
    }

    #[test]
    fn watchers_see_what_is_kept_then_everything_and_can_type() {
        let mut console = Console::new(RUN);
        console.write_all(b"before ").unwrap();
        let (typed, input) = mpsc::channel();
        let dir = serve(&console, move |keys| {
            typed.send(keys.to_vec()).unwrap();
            keys.len()
        });
        let mut one = Client::attach(&dir.path().join("c"), 1, None);
        let mut two = Client::attach(&dir.path().join("c"), 2, Some((RUN, 3)));
        assert_eq!(one.hear(), ServerMsg::Attached { run: RUN, at: 0, end: 7, taken: None });
        assert_eq!(two.hear(), ServerMsg::Attached { run: RUN, at: 3, end: 7, taken: None });
        console.write_all(b"after").unwrap();
        assert_eq!(one.output(12), (0, b"before after".to_vec()));
        assert_eq!(two.output(9), (3, b"ore after".to_vec()));
        one.say(&ClientMsg::Keys { at: 0, bytes: b"ab".to_vec() });
        assert_eq!(one.hear(), ServerMsg::Taken { count: 2 });
        one.say(&ClientMsg::Keys { at: 1, bytes: b"bc".to_vec() });
        assert_eq!(one.hear(), ServerMsg::Taken { count: 3 });
        assert_eq!(input.try_iter().flatten().collect::<Vec<u8>>(), b"abc");
        console.end(ServerMsg::Moved { host: "b".into() });
        assert_eq!(one.hear(), ServerMsg::Moved { host: "b".into() });
        assert_eq!(two.hear(), ServerMsg::Moved { host: "b".into() });
        assert_eq!(console.screen().watchers, 0);
    }

    #[test]
    fn keys_typed_after_the_state_was_saved_are_the_other_sides() {
        let mut source = Console::new(RUN);
        let dir = serve(&source, <[u8]>::len);
        let mut client = Client::attach(&dir.path().join("c"), 1, None);
        client.hear();
        client.say(&ClientMsg::Keys { at: 0, bytes: b"ab".to_vec() });
        assert_eq!(client.hear(), ServerMsg::Taken { count: 2 });
        source.write_all(b"login: ").unwrap();
        let mut sections = vec![source.save().unwrap()];
        client.say(&ClientMsg::Keys { at: 2, bytes: b"c".to_vec() });
        assert_eq!(client.output(7).1, b"login: ");
        source.end(ServerMsg::Moved { host: "b".into() });
        assert_eq!(client.hear(), ServerMsg::Moved { host: "b".into() }, "and not that c was taken");

        let target = Console::arriving();
        let (typed, input) = mpsc::channel();
        let dir = serve(&target, move |keys| {
            typed.send(keys.to_vec()).unwrap();
            keys.len()
        });
        // It may come before the guest.
        let mut client = Client::attach(&dir.path().join("c"), 1, Some((RUN, 5)));
        target.restore(&mut sections).unwrap();
        assert!(sections.is_empty());
        assert_eq!(client.hear(), ServerMsg::Attached { run: RUN, at: 5, end: 7, taken: Some(2) });
        client.say(&ClientMsg::Keys { at: 1, bytes: b"bc".to_vec() });
        assert_eq!(client.output(2), (5, b": ".to_vec()));
        assert_eq!(client.hear(), ServerMsg::Taken { count: 3 });
        assert_eq!(input.try_iter().flatten().collect::<Vec<u8>>(), b"c");
    }

    #[test]
    fn a_move_that_is_given_up_lets_keys_through_again() {
        let console = Console::new(RUN);
        let dir = serve(&console, <[u8]>::len);
        let mut client = Client::attach(&dir.path().join("c"), 1, None);
        client.hear();
        console.save().unwrap();
        client.say(&ClientMsg::Keys { at: 0, bytes: b"a".to_vec() });
        console.go_on();
        assert_eq!(client.hear(), ServerMsg::Taken { count: 1 });
    }

    #[test]
    fn a_guest_with_little_room_gets_all_keys_in_order() {
        let console = Console::new(RUN);
        let (typed, input) = mpsc::channel();
        let turn = AtomicBool::new(false);
        let dir = serve(&console, move |keys| {
            let room = usize::from(turn.fetch_xor(true, Ordering::SeqCst)).min(keys.len());
            typed.send(keys[..room].to_vec()).unwrap();
            room
        });
        let mut client = Client::attach(&dir.path().join("c"), 1, None);
        client.hear();
        client.say(&ClientMsg::Keys { at: 0, bytes: b"hello".to_vec() });
        assert_eq!(client.hear(), ServerMsg::Taken { count: 5 });
        assert_eq!(input.try_iter().flatten().collect::<Vec<u8>>(), b"hello");
    }

    #[test]
    fn a_watcher_that_was_too_slow_sees_what_it_missed_by_the_position() {
        let mut console = Console::new(RUN);
        let dir = serve(&console, <[u8]>::len);
        console.write_all(&vec![1; 3 * line::BACKLOG]).unwrap();
        let mut client = Client::attach(&dir.path().join("c"), 1, Some((RUN, 10)));
        let end = 3 * line::BACKLOG as u64;
        assert_eq!(client.hear(), ServerMsg::Attached { run: RUN, at: 10, end, taken: None });
        let (from, bytes) = client.output(line::BACKLOG);
        assert_eq!((from, bytes.len()), (2 * line::BACKLOG as u64, line::BACKLOG));
    }

    #[test]
    fn strangers_are_refused() {
        let console = Console::new(RUN);
        let dir = serve(&console, <[u8]>::len);
        let path = dir.path().join("c");
        let mut other = Client(UnixStream::connect(&path).unwrap(), Decoder::default());
        other.say(&ClientMsg::Attach { version: 77, client: [1; 16], seen: None });
        assert!(matches!(other.hear(), ServerMsg::Refused { reason } if reason.contains("not 77")));
        let mut rude = Client(UnixStream::connect(&path).unwrap(), Decoder::default());
        rude.0.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut rest = Vec::new();
        rude.0.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
        assert!(console.clone().restore(&mut vec![]).is_err());
    }
}
