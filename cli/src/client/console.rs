//! Staying attached to a VM's console while the VM changes host, its agent is started anew, or the way to it breaks.
//!
//! Lives here: connections, when to try again, when to give up. Never enters: positions and counts (`attachment`), terminals.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use vmove_compute::process::console::wire::{self, Decoder, ServerMsg};

use super::attachment::{Attachment, AttachmentError, Seen};
use super::http::ConsoleStream;
use super::{Client, ClientError};

/// Silence after which a connection is given up: the console says every few seconds that it lives.
const SILENCE: Duration = Duration::from_secs(15);
/// How long one attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// First pause between two attempts; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause between two attempts.
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// How long the console is looked for before it is given up.
const GIVE_UP: Duration = Duration::from_mins(1);
/// Keys that wait to be taken; when there are more the keyboard waits.
const MAX_WAITING: usize = 64 << 10;

/// What happens on a console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// What the guest says, and what becomes of it. After [`Seen::Ended`] nothing comes.
    Seen(Seen),
    /// The way to it broke, for this reason; it is looked for.
    Lost(String),
    /// It was not found again, for this reason. Nothing comes after this.
    GivenUp(String),
}

/// A console that is attended until this is dropped.
#[derive(Debug)]
pub struct Console {
    events: mpsc::Receiver<ConsoleEvent>,
    keys: mpsc::Sender<Vec<u8>>,
    task: tokio::task::JoinHandle<()>,
}

impl Console {
    /// Attaches to the console of a VM, wherever it is. That it is not there now is an error; later it is looked for.
    pub async fn attach(client: Client, vm: &str) -> Result<Self, ClientError> {
        let stream = client.console(vm).await?;
        let (told, events) = mpsc::channel(16);
        let (keys, typed) = mpsc::channel(16);
        let attachment = Attachment::new(uuid::Uuid::new_v4().into_bytes());
        let attendant = Attendant { client, vm: vm.to_owned(), attachment, told, typed, typing: true };
        Ok(Self { events, keys, task: tokio::spawn(attendant.attend(stream)) })
    }

    /// What happens next; none when there is nothing more to come.
    pub async fn next(&mut self) -> Option<ConsoleEvent> {
        self.events.recv().await
    }

    /// Where keys are typed. Waits while too many are not taken.
    pub fn keys(&self) -> mpsc::Sender<Vec<u8>> {
        self.keys.clone()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task that keeps a console attached.
struct Attendant {
    client: Client,
    vm: String,
    attachment: Attachment,
    told: mpsc::Sender<ConsoleEvent>,
    typed: mpsc::Receiver<Vec<u8>>,
    /// Somebody may still type.
    typing: bool,
}

/// How a connection ended.
enum Cut {
    /// The VM has gone to another host.
    Moved,
    Lost(String),
    /// The end of the console, or nobody listens to us.
    Over,
}

impl Attendant {
    async fn attend(mut self, stream: ConsoleStream) {
        let mut stream = Some(stream);
        let mut last_here = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut told_lost = false;
        loop {
            let attempt = match stream.take() {
                Some(stream) => Ok(stream),
                None => match timeout(CONNECT_LIMIT, self.client.console(&self.vm)).await {
                    Ok(answer) => answer.map_err(|error| error.to_string()),
                    Err(_) => Err("the agent does not answer".to_owned()),
                },
            };
            let why = match attempt {
                Ok(stream) => match self.stay(stream).await {
                    Cut::Over => return,
                    Cut::Moved => None,
                    Cut::Lost(why) => Some(why),
                },
                Err(why) => Some(why),
            };
            if self.attachment.is_greeted() {
                self.attachment.connect();
                (last_here, pause, told_lost) = (Instant::now(), FIRST_PAUSE, false);
            }
            if last_here.elapsed() > GIVE_UP {
                let why = why.unwrap_or_else(|| "nobody has it".to_owned());
                // Nobody listens any more: nothing is left to be told.
                let _ = self.told.send(ConsoleEvent::GivenUp(why)).await;
                return;
            }
            if let Some(why) = why
                && !std::mem::replace(&mut told_lost, true)
                && self.told.send(ConsoleEvent::Lost(why)).await.is_err()
            {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Stays with one connection until it ends.
    async fn stay(&mut self, stream: ConsoleStream) -> Cut {
        let (mut from, mut to) = tokio::io::split(stream);
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 16 << 10];
        let greeting = self.attachment.connect();
        if let Err(why) = send(&mut to, &greeting).await {
            return Cut::Lost(why);
        }
        loop {
            while let Some(keys) = self.attachment.next_keys() {
                if let Err(why) = send(&mut to, &keys).await {
                    return Cut::Lost(why);
                }
            }
            let room = self.attachment.waiting_keys() < MAX_WAITING;
            tokio::select! {
                read = timeout(SILENCE, from.read(&mut buffer)) => {
                    match read {
                        Ok(Ok(0)) => return Cut::Lost("the connection was closed".to_owned()),
                        Ok(Ok(n)) => decoder.push(&buffer[..n]),
                        Ok(Err(error)) => return Cut::Lost(error.to_string()),
                        Err(_) => return Cut::Lost("the console is silent".to_owned()),
                    }
                    match self.take_in(&mut decoder).await {
                        Ok(None) => {}
                        Ok(Some(cut)) => return cut,
                        Err(why) => return Cut::Lost(why),
                    }
                }
                keys = self.typed.recv(), if self.typing && room => match keys {
                    Some(keys) => self.attachment.type_in(&keys),
                    None => self.typing = false,
                },
            }
        }
    }

    /// Takes all whole messages in and tells what they mean.
    async fn take_in(&mut self, decoder: &mut Decoder) -> Result<Option<Cut>, String> {
        while let Some(message) = decoder.take::<ServerMsg>().map_err(|error| error.to_string())? {
            let seen =
                self.attachment.receive(message).map_err(|error: AttachmentError| error.to_string())?;
            for seen in seen {
                let cut = match &seen {
                    Seen::Moved(_) => Some(Cut::Moved),
                    Seen::Ended(_) => Some(Cut::Over),
                    _ => None,
                };
                if self.told.send(ConsoleEvent::Seen(seen)).await.is_err() {
                    return Ok(Some(Cut::Over));
                }
                if cut.is_some() {
                    return Ok(cut);
                }
            }
        }
        Ok(None)
    }
}

async fn send(to: &mut WriteHalf<ConsoleStream>, message: &wire::ClientMsg) -> Result<(), String> {
    let frame = wire::encode(message).map_err(|error| error.to_string())?;
    to.write_all(&frame).await.map_err(|error| error.to_string())?;
    to.flush().await.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{UnixListener, UnixStream};
    use wire::ClientMsg;

    /// The console's end of a connection, behind an agent that changes to the console's protocol at once.
    struct End(UnixStream, Decoder);

    impl End {
        async fn accept(listener: &UnixListener) -> anyhow::Result<Self> {
            let (mut stream, _) = listener.accept().await?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await? > 0 {}
            let answer =
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: vmove-console\r\n\r\n";
            stream.write_all(answer).await?;
            Ok(Self(stream, Decoder::default()))
        }

        async fn hear(&mut self) -> anyhow::Result<ClientMsg> {
            loop {
                if let Some(message) = self.1.take()? {
                    return Ok(message);
                }
                let mut bytes = Vec::new();
                anyhow::ensure!(self.0.read_buf(&mut bytes).await? > 0, "closed");
                self.1.push(&bytes);
            }
        }

        async fn say(&mut self, message: &ServerMsg) -> anyhow::Result<()> {
            Ok(self.0.write_all(&wire::encode(message)?).await?)
        }
    }

    fn attached(at: u64, taken: Option<u64>) -> ServerMsg {
        ServerMsg::Attached { run: [1; 16], at, end: at, taken }
    }

    #[tokio::test]
    async fn it_attaches_again_where_it_was_and_types_what_was_not_taken() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a.sock");
        let listener = UnixListener::bind(&path)?;
        let (first, console) =
            tokio::join!(End::accept(&listener), Console::attach(Client::unix(&path), "vm"));
        let (mut first, mut console) = (first?, console?);
        assert!(matches!(first.hear().await?, ClientMsg::Attach { seen: None, .. }));
        first.say(&attached(0, None)).await?;
        first.say(&ServerMsg::Output { at: 0, bytes: b"hello".to_vec() }).await?;
        assert_eq!(console.next().await, Some(ConsoleEvent::Seen(Seen::Output(b"hello".to_vec()))));
        console.keys().send(b"ab".to_vec()).await?;
        assert_eq!(first.hear().await?, ClientMsg::Keys { at: 0, bytes: b"ab".to_vec() });
        first.say(&ServerMsg::Moved { host: "b".into() }).await?;
        assert_eq!(console.next().await, Some(ConsoleEvent::Seen(Seen::Moved("b".into()))));

        let mut second = End::accept(&listener).await?;
        let ClientMsg::Attach { seen, .. } = second.hear().await? else { anyhow::bail!("no greeting") };
        assert_eq!(seen, Some(([1; 16], 5)));
        second.say(&attached(5, Some(1))).await?;
        assert_eq!(second.hear().await?, ClientMsg::Keys { at: 1, bytes: b"b".to_vec() });
        // Broken off without a word, and refused by the next agent: it goes on looking.
        drop(second);
        assert!(matches!(console.next().await, Some(ConsoleEvent::Lost(_))));
        let (mut refusing, _) = listener.accept().await?;
        refusing.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await?;
        let mut third = End::accept(&listener).await?;
        third.hear().await?;
        third.say(&attached(5, Some(2))).await?;
        third.say(&ServerMsg::Ended { reason: "off".into() }).await?;
        assert_eq!(console.next().await, Some(ConsoleEvent::Seen(Seen::Ended("off".into()))));
        assert_eq!(console.next().await, None);
        Ok(())
    }

    #[tokio::test]
    async fn a_console_that_is_not_there_at_first_is_an_error() {
        let attached = Console::attach(Client::unix("/nonexistent/agent.sock"), "vm").await;
        assert!(attached.is_err_and(|error| error.is_connection()));
    }
}
