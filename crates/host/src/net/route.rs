//! Links, addresses and routes of one network namespace, over rtnetlink.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind,
    InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {name}")]
pub struct Error {
    step: &'static str,
    name: String,
    #[source]
    source: io::Error,
}

/// A link, as far as we ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is switched on.
    pub up: bool,
}

/// Talks to the kernel about one network namespace: that of the thread that opened it, wherever it is used.
#[derive(Debug)]
pub struct Route {
    socket: Socket,
    sequence: u32,
}

impl Route {
    /// Opens the namespace of this thread.
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(failed("open a", "netlink socket"))?,
            sequence: 0,
        })
    }

    /// Makes a pair of virtual Ethernet devices: one here, its peer in another namespace.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_netns: impl AsFd) -> Result<(), Error> {
        self.add_pair((name, None), (peer, None), peer_netns)
    }

    /// As [`Route::add_veth`], with hardware addresses where the kernel is not to choose them.
    pub fn add_pair(
        &mut self,
        (name, mac): (&str, Option<[u8; 6]>),
        (peer, peer_mac): (&str, Option<[u8; 6]>),
        peer_netns: impl AsFd,
    ) -> Result<(), Error> {
        let address = |mac: [u8; 6]| LinkAttribute::Address(mac.to_vec());
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::NetNsFd(peer_netns.as_fd().as_raw_fd()),
        ];
        other.attributes.extend(peer_mac.map(address));
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        link.attributes.extend(mac.map(address));
        let pair = InfoData::Veth(InfoVeth::Peer(other));
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(pair),
        ]));
        self.change(
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(failed("make the device pair of", name))
    }

    /// Lets packets of version 4 that come in through a link go on to others.
    pub fn forward(&mut self, name: &str) -> Result<(), Error> {
        let mut settings = InetDevConf::default();
        settings.forwarding = 1;
        let settings = AfSpecInet::DevConfRequest(settings);
        self.set_family(name, AfSpecUnspec::Inet(vec![settings]))
            .map_err(failed("forward from", name))
    }

    /// Has a link give itself no address of version 6 when it is switched on. Where there is no version 6 none comes.
    pub fn no_link_local(&mut self, name: &str) -> Result<(), Error> {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        match self.set_family(name, AfSpecUnspec::Inet6(vec![none])) {
            Err(e) if is(&e, rustix::io::Errno::AFNOSUPPORT) => Ok(()),
            done => done.map_err(failed("keep addresses from", name)),
        }
    }

    fn set_family(&mut self, name: &str, settings: AfSpecUnspec) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::AfSpecUnspec(vec![settings]),
        ];
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Tells who has an address behind a link, so that nobody asks.
    pub fn add_neighbour(
        &mut self,
        address: IpAddr,
        mac: [u8; 6],
        name: &str,
    ) -> Result<(), Error> {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = family(address);
        neighbour.header.ifindex = self.index_of(name)?;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(address.into()),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.change(RouteNetlinkMessage::NewNeighbour(neighbour), flags)
            .map_err(failed("name a neighbour of", name))
    }

    /// Switches a link on.
    pub fn set_up(&mut self, name: &str) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.header.index = self.index_of(name)?;
        self.change(RouteNetlinkMessage::SetLink(link), 0)
            .map_err(failed("switch on", name))
    }

    /// Gives a link a hardware address.
    pub fn set_mac(&mut self, name: &str, mac: [u8; 6]) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.header.index = self.index_of(name)?;
        link.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.change(RouteNetlinkMessage::SetLink(link), 0)
            .map_err(failed("give a hardware address to", name))
    }

    /// Deletes a link; a pair goes together. Having none of this name is no error.
    pub fn delete_link(&mut self, name: &str) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        match self.change(RouteNetlinkMessage::DelLink(link), 0) {
            Err(e) if is(&e, rustix::io::Errno::NODEV) => Ok(()),
            done => done.map_err(failed("delete", name)),
        }
    }

    /// Puts a link into a group of links; having none of this name is no error.
    pub fn set_group(&mut self, name: &str, group: u32) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Group(group),
        ];
        match self.change(RouteNetlinkMessage::SetLink(link), 0) {
            Err(e) if is(&e, rustix::io::Errno::NODEV) => Ok(()),
            done => done.map_err(failed("group", name)),
        }
    }

    /// Deletes all links of a group at once, which the kernel makes wait once for all that may still use one of them. A
    /// pair goes together; an empty group is no error.
    pub fn delete_group(&mut self, group: u32) -> Result<(), Error> {
        let mut links = LinkMessage::default();
        links.attributes = vec![LinkAttribute::Group(group)];
        match self.change(RouteNetlinkMessage::DelLink(links), 0) {
            Err(e) if is(&e, rustix::io::Errno::NODEV) => Ok(()),
            done => done.map_err(failed("delete", "a group of links")),
        }
    }

    /// The links there are.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.ask(request, NLM_F_DUMP);
        let answers = answers.map_err(failed("list the", "links"))?;
        Ok(answers.into_iter().filter_map(link).collect())
    }

    /// Gives a link an address, in place of the same address with another prefix.
    pub fn add_address(&mut self, name: &str, address: IpAddr, prefix: u8) -> Result<(), Error> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = self.index_of(name)?;
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        if address.is_ipv6() {
            // Nobody else is on the wire: do not wait for others to object.
            message.header.flags = netlink_packet_route::address::AddressHeaderFlags::Nodad;
        }
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.change(RouteNetlinkMessage::NewAddress(message), flags)
            .map_err(failed("give an address to", name))
    }

    /// Adds a route: to a network through a link, and through a gateway behind that link if there is one.
    pub fn add_route(
        &mut self,
        (destination, prefix): (IpAddr, u8),
        name: &str,
        gateway: Option<IpAddr>,
    ) -> Result<(), Error> {
        let mut route = RouteMessage::default();
        route.header.address_family = family(destination);
        route.header.destination_prefix_length = prefix;
        route.header.table = netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = RouteProtocol::Static;
        route.header.kind = RouteType::Unicast;
        route.header.scope = match gateway {
            Some(_) => RouteScope::Universe,
            None => RouteScope::Link,
        };
        if prefix > 0 {
            let to = RouteAttribute::Destination(destination.into());
            route.attributes.push(to);
        }
        let through = RouteAttribute::Oif(self.index_of(name)?);
        route.attributes.push(through);
        if let Some(gateway) = gateway {
            route.header.flags = RouteFlags::Onlink;
            route
                .attributes
                .push(RouteAttribute::Gateway(gateway.into()));
        }
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.change(RouteNetlinkMessage::NewRoute(route), flags)
            .map_err(failed("route through", name))
    }

    /// Asked without a message: for an answer in messages the kernel brings the state of the link up to date first, which
    /// takes the longer the more routes there are.
    fn index_of(&self, name: &str) -> Result<u32, Error> {
        let index = rustix::net::netdevice::name_to_index(&self.socket, name);
        index.map_err(|e| failed("find the link", name)(e.into()))
    }

    fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(request, NLM_F_ACK | flags).map(drop)
    }

    /// Sends a request and gathers what is answered to it, up to the acknowledgement or the end of a dump.
    fn ask(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP;
        let acknowledged = flags & NLM_F_ACK != 0;
        let mut answers = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                let message = message.map_err(io::Error::other)?;
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length.max(16)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Error(e) => {
                        return match e.code {
                            None => Ok(answers),
                            Some(_) => Err(e.to_io()),
                        };
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
                if !dump && !acknowledged {
                    return Ok(answers);
                }
            }
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let name = message.attributes.into_iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })?;
    Some(Link {
        index: message.header.index,
        name,
        up: message.header.flags.contains(LinkFlags::Up),
    })
}

fn is(error: &io::Error, wanted: rustix::io::Errno) -> bool {
    error.raw_os_error() == Some(wanted.raw_os_error())
}

fn failed<'a>(step: &'static str, name: &'a str) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error {
        step,
        name: name.to_owned(),
        source,
    }
}
