//! The socket on which the agent asks: one line of JSON in, one out, one exchange a connection.
//!
//! Lives here: reading and answering lines, within limits. Never enters: what is answered.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use super::protocol::{MAX_LINE, Reply, Request};

/// How long a caller may take to send its line or to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves requests until the process ends.
pub fn serve(path: &Path, answer: impl Fn(Request) -> Reply + Send + Sync + 'static) -> io::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    let answer = Arc::new(answer);
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming() {
            let answer = Arc::clone(&answer);
            let spawned = stream.and_then(|stream| {
                thread::Builder::new().name("control-call".into()).spawn(move || {
                    if let Err(error) = exchange(stream, &*answer) {
                        tracing::debug!(%error, "control connection");
                    }
                })
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "control socket");
            }
        }
    })?;
    Ok(())
}

fn exchange(mut stream: UnixStream, answer: &impl Fn(Request) -> Reply) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    BufReader::new((&stream).take(MAX_LINE as u64)).read_until(b'\n', &mut line)?;
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => answer(request),
        Err(error) => Reply::Error(format!("not a request of this version: {error}")),
    };
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    stream.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_requests_and_refuses_rubbish() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        serve(
            &path,
            |request| {
                if request == Request::Cancel { Reply::Ok } else { Reply::Error("no".into()) }
            },
        )
        .unwrap();
        let ask = |text: &str| {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            let mut reply = String::new();
            BufReader::new(stream).read_line(&mut reply).unwrap();
            serde_json::from_str::<Reply>(&reply).unwrap()
        };
        assert_eq!(ask("\"cancel\"\n"), Reply::Ok);
        assert!(matches!(ask("{\"nonsense\": 1}\n"), Reply::Error(text) if text.contains("not a request")));
    }
}
