//! The block device on real images: data, framing, notifications, refusals, pausing, taps.

mod support;

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use support::requests::*;
use support::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmove_devices::disk::{DiskContext, GuestSlice, WriteTap, ZeroKind};
use vmove_devices::{Block, DeviceError, DiskHandle};
use vmove_storage::{BlockDevice, BlockError, ImageFormat, ImageSpec, OpenOptions};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;

struct Disk {
    machine: Machine,
    handle: DiskHandle,
    image: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

fn image(format: ImageFormat) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(match format {
        ImageFormat::Raw => "disk.raw",
        ImageFormat::Qcow2 => "disk.qcow2",
    });
    vmove_storage::create(&path, &ImageSpec::new(format, DISK)).unwrap();
    (dir, path)
}

fn attach(image: PathBuf, read_only: bool) -> Disk {
    let mut machine = Machine::new(memory());
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let handle = DiskHandle::open("disk0", &image, options).unwrap();
    let block = Block::new(Arc::clone(&machine.memory), handle.clone(), "serial-0123456789-too-long");
    machine.bus.add_virtio("disk0", Box::new(block)).unwrap();
    Disk { machine, handle, image, _dir: None }
}

fn disk(format: ImageFormat) -> Disk {
    let (dir, path) = image(format);
    Disk { _dir: Some(dir), ..attach(path, false) }
}

fn segments(machine: &Machine, list: &[(u64, u32, u32)]) -> u32 {
    let mut bytes = Vec::new();
    for (sector, count, flags) in list {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    put(machine, 0, &bytes);
    bytes.len() as u32
}

#[test]
fn data_comes_back_through_both_formats_and_after_reopening() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let disk = disk(format);
        let machine = &disk.machine;
        let mut driver = Driver::start(machine, 1, VERSION_1 | EVENT_IDX | INDIRECT, 64);
        write(&mut driver, machine, 8, &pattern(1, 65536));
        write(&mut driver, machine, 100_001, &pattern(2, 512));
        assert_eq!(read(&mut driver, machine, 8, 65536), pattern(1, 65536));
        assert_eq!(read(&mut driver, machine, 100_001, 512), pattern(2, 512));
        assert_eq!(read(&mut driver, machine, 100_002, 512), [0; 512]);
        assert_eq!(request(&mut driver, machine, FLUSH, 0, 0), (OK, 1));
        disk.handle.stop().unwrap();
        assert!(matches!(disk.handle.pause(), Err(DeviceError::Gone { .. })));

        let again = attach(disk.image.clone(), true);
        let mut driver = Driver::start(&again.machine, 1, VERSION_1, 64);
        assert_eq!(read(&mut driver, &again.machine, 8, 65536), pattern(1, 65536));
        put(&again.machine, 0, &pattern(3, 512));
        assert_eq!(request(&mut driver, &again.machine, OUT, 8, 512).0, IOERR, "read-only");
        assert_eq!(read(&mut driver, &again.machine, 8, 65536), pattern(1, 65536));
    }
}

#[test]
fn configuration_says_what_the_disk_is() {
    let disk = disk(ImageFormat::Qcow2);
    let machine = &disk.machine;
    let config = machine.structure(1, 4);
    assert_eq!(machine.read(config, 8), DISK / 512);
    assert_eq!(machine.read(config + 12, 4), 254);
    assert_eq!(machine.read(config + 20, 4), 512);
    assert_eq!(machine.read(config + 24, 1), 3);
    let common = machine.structure(1, 1);
    machine.write(common, 0, 4);
    let features = machine.read(common + 4, 4);
    assert_eq!(features & 0xff_ffff, 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14);
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    assert_eq!(request(&mut driver, machine, GET_ID, 0, 20), (OK, 21));
    assert_eq!(get(machine, 0, 20), b"serial-0123456789-to");
}

#[test]
fn zeroes_and_discards() {
    let disk = disk(ImageFormat::Qcow2);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1 | EVENT_IDX, 64);
    write(&mut driver, machine, 0, &pattern(1, 0x1_8000));
    let len = segments(machine, &[(0, 8, 0), (16, 8, 1)]);
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, len), (OK, 1));
    let mut expected = pattern(1, 0x1_8000);
    expected[..4096].fill(0);
    expected[8192..12288].fill(0);
    assert_eq!(read(&mut driver, machine, 0, 0x1_8000), expected);
    let len = segments(machine, &[(0, 128, 0)]);
    assert_eq!(request(&mut driver, machine, DISCARD, 0, len), (OK, 1));
    assert_eq!(read(&mut driver, machine, 0, 0x1_8000)[0x1_0000..], expected[0x1_0000..]);

    let len = segments(machine, &[(0, 8, 1)]);
    assert_eq!(request(&mut driver, machine, DISCARD, 0, len).0, UNSUPP, "unmap is no discard flag");
    let len = segments(machine, &[(0, 8, 2)]);
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, len).0, UNSUPP, "an unknown flag");
    let len = segments(machine, &[(0, 8, 0), (DISK / 512 - 1, 2, 0)]);
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, len).0, IOERR, "past the end");
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, 15).0, IOERR, "half a segment");
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, 16 * 33).0, IOERR, "too many segments");
}

#[test]
fn bad_requests_get_their_status() {
    let disk = disk(ImageFormat::Raw);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    let end = DISK / 512;
    assert_eq!(request(&mut driver, machine, 99, 0, 512).0, UNSUPP);
    assert_eq!(request(&mut driver, machine, IN, end, 512).0, IOERR);
    assert_eq!(request(&mut driver, machine, IN, u64::MAX, 1024).0, IOERR);
    assert_eq!(request(&mut driver, machine, OUT, 0, 511).0, IOERR);
    header(machine, 0, IN, 0);
    let (head, _, status_at) = places(0);
    driver.offer(machine, &[(head, 16, false), (RAM as u64 - 256, 512, true), (status_at, 1, true)]);
    driver.kick(machine);
    assert_eq!(driver.collect(machine, 1)[0].1, 1);
    assert_eq!(status(machine, 0), IOERR, "data past the end of memory");
    // A status outside of memory: nobody can be told, but the chain comes back.
    driver.offer(machine, &[(head, 16, false), (1 << 40, 1, true)]);
    driver.kick(machine);
    assert_eq!(driver.collect(machine, 1)[0].1, 0);
    assert_eq!(driver.status(machine) & NEEDS_RESET, 0);
    assert_eq!(request(&mut driver, machine, IN, end - 1, 512).0, OK, "the last sector");
    // No room for header or status: the device gives up.
    driver.offer(machine, &[(head, 15, false), (status_at, 1, true)]);
    driver.kick(machine);
    machine.messages.wait_until(|| driver.status(machine) & NEEDS_RESET != 0);
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    driver.offer(machine, &[(head, 16, false)]);
    driver.kick(machine);
    machine.messages.wait_until(|| driver.status(machine) & NEEDS_RESET != 0);
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    assert_eq!(request(&mut driver, machine, FLUSH, 0, 0), (OK, 1));
}

#[test]
fn framing_is_free_and_buffers_may_cross_memory_regions() {
    let disk = disk(ImageFormat::Qcow2);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1 | INDIRECT, 64);
    let (head, _, status_at) = places(0);
    let edge = REGION_EDGE - 300;
    let bytes = pattern(7, 1024);
    machine.memory.write_slice(&bytes, GuestAddress(edge)).unwrap();
    header(machine, 0, OUT, 5);
    // The header in three parts, the last together with data.
    let header_copy = edge - 4;
    let mut tail = [0; 4];
    machine.memory.read_slice(&mut tail, GuestAddress(head + 12)).unwrap();
    machine.memory.write_slice(&tail, GuestAddress(header_copy)).unwrap();
    let pieces =
        [(head, 7, false), (head + 7, 5, false), (header_copy, 4 + 1000, false), (edge + 1000, 24, false)];
    driver.offer_indirect(machine, &[&pieces[..], &[(status_at, 1, true)]].concat());
    driver.kick(machine);
    assert_eq!(driver.collect(machine, 1)[0].1, 1);
    assert_eq!(status(machine, 0), OK);
    // The status in one buffer with the end of the data.
    header(machine, 0, IN, 5);
    let data = places(0).1;
    driver.offer_indirect(machine, &[(head, 16, false), (data, 1000, true), (data + 1000, 25, true)]);
    driver.kick(machine);
    assert_eq!(driver.collect(machine, 1)[0].1, 1025);
    let mut read = get(machine, 0, 1025);
    assert_eq!(read.pop(), Some(OK));
    assert_eq!(read, bytes);
}

#[test]
fn many_requests_at_once_wrap_the_ring_and_stay_apart() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX | INDIRECT] {
        let disk = disk(ImageFormat::Qcow2);
        let machine = &disk.machine;
        let mut driver = Driver::start(machine, 1, features, 256);
        for round in 0..6u64 {
            let kind = if round % 2 == 0 { OUT } else { IN };
            for slot in 0..80 {
                header(machine, slot, kind, (round / 2 * 80 + slot) * 8);
                let bytes = if kind == OUT { pattern(round * 100 + slot, 4096) } else { vec![0; 4096] };
                put(machine, slot, &bytes);
                driver.offer(machine, &chain(slot, 4096, kind == IN));
            }
            driver.kick(machine);
            let mut heads: Vec<_> = driver.collect(machine, 80).into_iter().map(|(head, _)| head).collect();
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), 80, "every chain came back once");
            for slot in 0..80 {
                assert_eq!(status(machine, slot), OK);
                let written = round - round % 2;
                assert_eq!(get(machine, slot, 4096), pattern(written * 100 + slot, 4096));
            }
        }
    }
}

#[test]
fn interrupts_come_only_when_wanted() {
    let disk = disk(ImageFormat::Raw);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1 | EVENT_IDX, 64);
    driver.want_interrupt_after(machine, 10);
    for slot in 0..10 {
        header(machine, slot, IN, slot);
        driver.offer(machine, &chain(slot, 512, true));
    }
    driver.kick(machine);
    driver.collect(machine, 10);
    disk.handle.pause().unwrap();
    assert_eq!(machine.messages.take().len(), 1, "one for all ten");
    disk.handle.resume().unwrap();

    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    machine.memory.write_obj(1u16, GuestAddress(AVAILABLE)).unwrap();
    header(machine, 0, IN, 0);
    driver.offer(machine, &chain(0, 512, true));
    driver.kick(machine);
    while machine.used_index() == 0 {
        std::thread::yield_now();
    }
    disk.handle.pause().unwrap();
    assert_eq!(machine.messages.count(), 0, "the driver polls");
}

#[test]
fn reads_mark_the_pages_they_write() {
    let disk = disk(ImageFormat::Raw);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    header(machine, 0, IN, 0);
    let (_, data, _) = places(0);
    driver.offer(machine, &chain(0, 8192, true));
    let region = machine.memory.find_region(GuestAddress(0)).unwrap();
    let dirty = |address: u64| GuestMemoryRegion::bitmap(region).dirty_at(address as usize);
    region.get_mmap().bitmap().reset();
    assert!(!dirty(data));
    driver.kick(machine);
    driver.collect(machine, 1);
    disk.handle.pause().unwrap();
    assert!(dirty(data) && dirty(data + 4096) && dirty(USED) && dirty(places(0).2));
    assert!(!dirty(data + 8192));
}

#[test]
fn what_is_offered_during_a_pause_is_served_after_it() {
    let disk = disk(ImageFormat::Qcow2);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1 | EVENT_IDX, 64);
    write(&mut driver, machine, 0, &pattern(1, 512));
    machine.bus.pause_all().unwrap();
    put(machine, 0, &[0; 512]);
    header(machine, 0, IN, 0);
    driver.offer(machine, &chain(0, 512, true));
    driver.kick(machine);
    disk.handle.pause().unwrap();
    assert_eq!(machine.used_index(), 1, "only the first write");
    machine.bus.resume_all().unwrap();
    assert_eq!(driver.collect(machine, 1)[0].1, 513);
    assert_eq!(get(machine, 0, 512), pattern(1, 512));
}

/// Runs `task` on the disk's thread and waits for its end.
fn on_disk<T: Send + 'static, F>(
    handle: &DiskHandle,
    task: impl FnOnce(DiskContext) -> F + Send + 'static,
) -> T
where
    F: Future<Output = T> + 'static,
{
    let (done, result) = mpsc::channel();
    handle
        .run(Box::new(move |context| async move { done.send(task(context).await).unwrap() }.boxed_local()))
        .unwrap();
    result.recv().unwrap()
}

/// A tap that writes to the device, remembers what it saw, and can hold writes back.
struct Recorder {
    context: DiskContext,
    seen: RefCell<Vec<(u64, u64, Option<ZeroKind>)>>,
    /// If set, writes say that they are there and then wait for the event.
    held: Option<(mpsc::Sender<()>, EventFd)>,
}

impl WriteTap for Recorder {
    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [GuestSlice<'a>],
    ) -> LocalBoxFuture<'a, Result<(), BlockError>> {
        async move {
            if let Some((arrived, release)) = &self.held {
                arrived.send(()).unwrap();
                self.context.ring().readable(release.as_raw_fd()).await.unwrap();
            }
            let mut bytes = vec![0; data.iter().map(|slice| slice.len()).sum()];
            let mut at = 0;
            for slice in data {
                at += slice.copy_to(&mut bytes[at..]);
            }
            self.seen.borrow_mut().push((offset, bytes.len() as u64, None));
            self.context.path().device().write(offset, (&bytes).into()).await
        }
        .boxed_local()
    }

    fn zero(&self, offset: u64, len: u64, kind: ZeroKind) -> LocalBoxFuture<'_, Result<(), BlockError>> {
        self.seen.borrow_mut().push((offset, len, Some(kind)));
        async move { self.context.path().device().write_zeroes(offset, len, false).await }.boxed_local()
    }
}

#[test]
fn a_tap_sees_every_change_and_can_be_taken_away() {
    let disk = disk(ImageFormat::Qcow2);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    write(&mut driver, machine, 0, &pattern(1, 512));
    let (seen, report) = mpsc::channel();
    let end = EventFd::new(0).unwrap();
    let ending = end.try_clone().unwrap();
    on_disk(&disk.handle, move |context| async move {
        let quiet = context.quiesce().await;
        let tap = Rc::new(Recorder { context: context.clone(), seen: RefCell::default(), held: None });
        context.path().set_tap(&quiet, Some(tap.clone()));
        let ring = Rc::clone(context.ring());
        ring.spawn(async move {
            context.ring().readable(ending.as_raw_fd()).await.unwrap();
            let quiet = context.quiesce().await;
            context.path().set_tap(&quiet, None);
            seen.send(tap.seen.take()).unwrap();
        });
    });
    write(&mut driver, machine, 8, &pattern(2, 1024));
    let len = segments(machine, &[(8, 1, 1)]);
    assert_eq!(request(&mut driver, machine, WRITE_ZEROES, 0, len).0, OK);
    let len = segments(machine, &[(128, 128, 0)]);
    assert_eq!(request(&mut driver, machine, DISCARD, 0, len).0, OK);
    assert_eq!(read(&mut driver, machine, 9, 512), pattern(2, 1024)[512..]);
    end.write(1).unwrap();
    let seen = report.recv().unwrap();
    let expected = [
        (4096, 1024, None),
        (4096, 512, Some(ZeroKind::Zero { may_unmap: true })),
        (65536, 65536, Some(ZeroKind::Discard)),
    ];
    assert_eq!(seen, expected);
    write(&mut driver, machine, 8, &pattern(3, 512));
    assert_eq!(read(&mut driver, machine, 8, 512), pattern(3, 512));
}

#[test]
fn pause_and_reset_wait_for_requests_in_flight() {
    let disk = disk(ImageFormat::Raw);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    let hold = |handle: &DiskHandle| {
        let (arrived, arrival) = mpsc::channel();
        let release = EventFd::new(0).unwrap();
        let held = Some((arrived, release.try_clone().unwrap()));
        on_disk(handle, move |context| async move {
            let tap = Recorder { context: context.clone(), seen: RefCell::default(), held };
            let quiet = context.quiesce().await;
            context.path().set_tap(&quiet, Some(Rc::new(tap)));
        });
        (arrival, release)
    };
    let offer = |driver: &mut Driver, arrival: mpsc::Receiver<()>| {
        put(machine, 0, &pattern(4, 512));
        header(machine, 0, OUT, 3);
        driver.offer(machine, &chain(0, 512, false));
        driver.kick(machine);
        arrival.recv().unwrap();
    };

    let (arrival, release) = hold(&disk.handle);
    offer(&mut driver, arrival);
    let pausing = disk.handle.start_pause().unwrap();
    assert_eq!(machine.used_index(), 0);
    release.write(1).unwrap();
    pausing.wait().unwrap();
    assert_eq!(machine.used_index(), 1, "a pause holds once the write is in the used ring");
    disk.handle.resume().unwrap();
    driver.collect(machine, 1);

    let (arrival, release) = hold(&disk.handle);
    offer(&mut driver, arrival);
    std::thread::scope(|scope| {
        let common = driver.common;
        let reset = scope.spawn(move || machine.write(common + 0x14, 0, 1));
        release.write(1).unwrap();
        reset.join().unwrap();
    });
    assert_eq!(machine.used_index(), 2, "the reset came back after the write had ended");
    assert_eq!(driver.status(machine), 0);
    on_disk(&disk.handle, |context| async move {
        let quiet = context.quiesce().await;
        context.path().set_tap(&quiet, None);
    });
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    assert_eq!(read(&mut driver, machine, 3, 512), pattern(4, 512));
}

#[test]
fn the_disk_goes_on_from_another_image() {
    let disk = disk(ImageFormat::Raw);
    let machine = &disk.machine;
    let mut driver = Driver::start(machine, 1, VERSION_1, 64);
    write(&mut driver, machine, 0, &pattern(1, 512));
    let (_dir, other) = image(ImageFormat::Qcow2);
    let small = other.with_file_name("small.raw");
    vmove_storage::create(&small, &ImageSpec::new(ImageFormat::Raw, MIB)).unwrap();
    let path = other.clone();
    on_disk(&disk.handle, move |context| async move {
        let open =
            async |path| BlockDevice::open(context.ring(), path, OpenOptions::default()).await.unwrap();
        let quiet = context.quiesce().await;
        let refused = context.path().replace_device(&quiet, Rc::new(open(&small).await));
        assert!(refused.is_err(), "another size");
        context.path().replace_device(&quiet, Rc::new(open(&path).await)).unwrap();
    });
    assert_eq!(read(&mut driver, machine, 0, 512), [0; 512]);
    write(&mut driver, machine, 0, &pattern(2, 512));
    disk.handle.stop().unwrap();
    for (image, expected) in [(disk.image.clone(), pattern(1, 512)), (other, pattern(2, 512))] {
        let again = attach(image, true);
        let mut driver = Driver::start(&again.machine, 1, VERSION_1, 64);
        assert_eq!(read(&mut driver, &again.machine, 0, 512), expected);
    }
}

#[test]
fn a_missing_image_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.qcow2");
    let error = DiskHandle::open("disk0", &path, OpenOptions::default()).err().unwrap().to_string();
    assert!(error.contains("disk0") && error.contains("none.qcow2"), "{error}");
}
