//! `--device` and `--threads`.

use anyhow::Result;
use tch::Device;

use crate::failure::usage;

/// The devices that a list of names means: `cpu`, `cuda` (the first GPU), `cuda:N`, `cuda:all`, `auto` (and nothing: the first GPU if there is one),
/// or several separated by commas, over which one peer spreads its batches.
///
/// # Errors
/// A name that is none, a GPU that is not there, or one named twice (exit code 2).
pub fn devices(names: Option<&str>) -> Result<Vec<Device>> {
    let names = names.unwrap_or("auto");
    if names == "cuda:all" {
        let all: Vec<Device> = (0..trainer::device::gpus()).map(Device::Cuda).collect();
        return if all.is_empty() { Err(no_gpu(names)) } else { Ok(all) };
    }
    let mut devices = Vec::new();
    for name in names.split(',') {
        let device = device(Some(name.trim()))?;
        if device != Device::Cpu && devices.contains(&device) {
            return Err(usage(format!("--device {names}: {name} twice; name each GPU once")));
        }
        devices.push(device);
    }
    Ok(devices)
}

/// The one device that a name means, of those that [`devices`] knows.
///
/// # Errors
/// As there.
pub fn device(name: Option<&str>) -> Result<Device> {
    let name = name.unwrap_or("auto");
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let gpus = trainer::device::gpus();
    let gpu = |index: usize| match index < gpus {
        true => Ok(Device::Cuda(index)),
        false => Err(no_gpu(name)),
    };
    match name {
        "auto" => Ok(if gpus > 0 { Device::Cuda(0) } else { Device::Cpu }),
        "cuda" => gpu(0),
        other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => gpu(index),
            None => Err(usage(format!(
                "--device {other}: not a device; use cpu, cuda, cuda:N or auto"
            ))),
        },
    }
}

fn no_gpu(name: &str) -> anyhow::Error {
    let gpus = trainer::device::gpus();
    let why = if gpus == 0 {
        format!(": {}", trainer::device::why_no_gpu())
    } else {
        String::new()
    };
    usage(format!(
        "--device {name}: there are {gpus} usable GPUs here{why}; use --device cpu or auto"
    ))
}

/// The number of threads: as given, else all cores.
///
/// # Errors
/// None, or absurdly many (exit code 2).
pub fn threads(given: Option<usize>) -> Result<usize> {
    match given {
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        Some(n @ 1..=1024) => Ok(n),
        Some(n) => Err(usage(format!("--threads {n}: 1 to 1024; leave it out for all cores"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_go_by_their_usual_names() {
        assert_eq!(device(Some("cpu")).unwrap(), Device::Cpu);
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:9999", "", "cpu,gpu", "cpu,"] {
            assert!(devices(Some(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(devices(Some("cpu, cpu")).unwrap(), [Device::Cpu; 2]);
        if trainer::device::gpus() > 0 {
            let told = devices(Some("cuda:0,cuda")).unwrap_err().to_string();
            assert!(told.contains("twice"), "{told}");
        }
        assert!(threads(Some(0)).is_err());
        assert_eq!(threads(Some(3)).unwrap(), 3);
    }
}
