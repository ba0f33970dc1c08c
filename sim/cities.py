"""Where people and machines are: a table of cities for synthetic geography.

Latitude and longitude in degrees (to about 0.1), and a weight: how many Islands to expect there against
others. Weights follow population and how well connected it is, roughly; they are an assumption, not a census.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class City(NamedTuple):
    """`region`: two letters, the continent."""

    name: str
    region: str
    latitude: float
    longitude: float
    weight: int


_TABLE: Final = """
London EU 51.5 -0.1 90|Paris EU 48.9 2.4 80|Frankfurt EU 50.1 8.7 70|Berlin EU 52.5 13.4 60
Amsterdam EU 52.4 4.9 60|Munich EU 48.1 11.6 40|Hamburg EU 53.6 10.0 30|Cologne EU 50.9 7.0 30
Vienna EU 48.2 16.4 30|Zurich EU 47.4 8.5 30|Brussels EU 50.9 4.4 25|Madrid EU 40.4 -3.7 40
Barcelona EU 41.4 2.2 30|Lisbon EU 38.7 -9.1 20|Porto EU 41.2 -8.6 8|Milan EU 45.5 9.2 35
Rome EU 41.9 12.5 25|Naples EU 40.9 14.3 10|Warsaw EU 52.2 21.0 35|Krakow EU 50.1 19.9 12
Prague EU 50.1 14.4 25|Budapest EU 47.5 19.0 18|Bucharest EU 44.4 26.1 18|Sofia EU 42.7 23.3 12
Athens EU 38.0 23.7 15|Stockholm EU 59.3 18.1 30|Oslo EU 59.9 10.8 18|Copenhagen EU 55.7 12.6 20
Helsinki EU 60.2 24.9 20|Gothenburg EU 57.7 12.0 8|Dublin EU 53.3 -6.3 20|Manchester EU 53.5 -2.2 20
Edinburgh EU 55.9 -3.2 10|Lyon EU 45.8 4.8 12|Marseille EU 43.3 5.4 12|Riga EU 56.9 24.1 6
Vilnius EU 54.7 25.3 6|Tallinn EU 59.4 24.8 6|Belgrade EU 44.8 20.5 10|Zagreb EU 45.8 16.0 6
Kyiv EU 50.5 30.5 20|Lviv EU 49.8 24.0 6|Moscow EU 55.8 37.6 40|Saint-Petersburg EU 59.9 30.3 18
Yekaterinburg EU 56.8 60.6 6|Novosibirsk AS 55.0 82.9 6|Istanbul EU 41.0 29.0 30|Ankara AS 39.9 32.9 10
Tel-Aviv AS 32.1 34.8 18|Dubai AS 25.2 55.3 18|Riyadh AS 24.7 46.7 12|Doha AS 25.3 51.5 5
Kuwait AS 29.4 48.0 5|Tehran AS 35.7 51.4 15|Baghdad AS 33.3 44.4 5|Cairo AF 30.0 31.2 15
Casablanca AF 33.6 -7.6 6|Algiers AF 36.8 3.1 5|Tunis AF 36.8 10.2 4|Lagos AF 6.5 3.4 12|Accra AF 5.6 -0.2 4
Abidjan AF 5.3 -4.0 3|Dakar AF 14.7 -17.5 3|Nairobi AF -1.3 36.8 8|Addis-Ababa AF 9.0 38.7 3
Johannesburg AF -26.2 28.0 15|Cape-Town AF -33.9 18.4 8|Durban AF -29.9 31.0 4|Luanda AF -8.8 13.2 2
Kigali AF -1.9 30.1 2|New-York NA 40.7 -74.0 90|Washington NA 38.9 -77.0 70|Boston NA 42.4 -71.1 40
Philadelphia NA 40.0 -75.2 25|Atlanta NA 33.7 -84.4 40|Miami NA 25.8 -80.2 30|Chicago NA 41.9 -87.6 55
Detroit NA 42.3 -83.0 18|Minneapolis NA 45.0 -93.3 18|Dallas NA 32.8 -96.8 45|Houston NA 29.8 -95.4 30
Austin NA 30.3 -97.7 25|Denver NA 39.7 -105.0 25|Salt-Lake-City NA 40.8 -111.9 12|Phoenix NA 33.4 -112.1 20
Las-Vegas NA 36.2 -115.1 10|Los-Angeles NA 34.1 -118.2 70|San-Diego NA 32.7 -117.2 20
San-Francisco NA 37.8 -122.4 70|San-Jose NA 37.3 -121.9 40|Portland NA 45.5 -122.7 20
Seattle NA 47.6 -122.3 45|Vancouver NA 49.3 -123.1 22|Calgary NA 51.0 -114.1 10|Toronto NA 43.7 -79.4 40
Montreal NA 45.5 -73.6 28|Ottawa NA 45.4 -75.7 8|Halifax NA 44.6 -63.6 3|Kansas-City NA 39.1 -94.6 12
Saint-Louis NA 38.6 -90.2 12|Nashville NA 36.2 -86.8 12|Charlotte NA 35.2 -80.8 14|Raleigh NA 35.8 -78.6 14
Pittsburgh NA 40.4 -80.0 12|Cleveland NA 41.5 -81.7 10|Honolulu NA 21.3 -157.9 3|Anchorage NA 61.2 -149.9 2
Mexico-City NA 19.4 -99.1 30|Guadalajara NA 20.7 -103.3 8|Monterrey NA 25.7 -100.3 10
Guatemala NA 14.6 -90.5 3|San-Jose-CR NA 9.9 -84.1 3|Panama NA 9.0 -79.5 3|Havana NA 23.1 -82.4 1
San-Juan NA 18.5 -66.1 3|Bogota SA 4.7 -74.1 14|Medellin SA 6.2 -75.6 6|Quito SA -0.2 -78.5 4
Lima SA -12.0 -77.0 12|Santiago SA -33.4 -70.7 14|Buenos-Aires SA -34.6 -58.4 22|Montevideo SA -34.9 -56.2 4
Asuncion SA -25.3 -57.6 2|La-Paz SA -16.5 -68.1 2|Caracas SA 10.5 -66.9 3|Sao-Paulo SA -23.6 -46.6 50
Rio-de-Janeiro SA -22.9 -43.2 22|Brasilia SA -15.8 -47.9 8|Fortaleza SA -3.7 -38.5 6
Porto-Alegre SA -30.0 -51.2 6|Mumbai AS 19.1 72.9 45|Delhi AS 28.6 77.2 40|Bangalore AS 13.0 77.6 45
Chennai AS 13.1 80.3 20|Hyderabad AS 17.4 78.5 22|Kolkata AS 22.6 88.4 12|Karachi AS 24.9 67.0 10
Lahore AS 31.5 74.3 8|Dhaka AS 23.8 90.4 10|Colombo AS 6.9 79.9 4|Kathmandu AS 27.7 85.3 2
Singapore AS 1.4 103.8 45|Kuala-Lumpur AS 3.1 101.7 18|Jakarta AS -6.2 106.8 25|Bangkok AS 13.8 100.5 20
Ho-Chi-Minh AS 10.8 106.7 16|Hanoi AS 21.0 105.8 12|Manila AS 14.6 121.0 18|Hong-Kong AS 22.3 114.2 35
Taipei AS 25.0 121.6 30|Shenzhen AS 22.5 114.1 40|Shanghai AS 31.2 121.5 45|Beijing AS 39.9 116.4 45
Chengdu AS 30.7 104.1 18|Wuhan AS 30.6 114.3 14|Seoul AS 37.6 127.0 50|Busan AS 35.2 129.1 10
Tokyo AS 35.7 139.7 75|Osaka AS 34.7 135.5 35|Fukuoka AS 33.6 130.4 8|Sapporo AS 43.1 141.4 5
Almaty AS 43.2 76.9 5|Tashkent AS 41.3 69.2 4|Tbilisi AS 41.7 44.8 4|Vladivostok AS 43.1 131.9 2
Sydney OC -33.9 151.2 35|Melbourne OC -37.8 145.0 30|Brisbane OC -27.5 153.0 14|Perth OC -31.9 115.9 10
Auckland OC -36.8 174.8 10
"""


def _read(table: str) -> tuple[City, ...]:
    cities: list[City] = []
    for entry in table.replace("\n", "|").split("|"):
        if entry:
            name, region, latitude, longitude, weight = entry.split()
            place = name.replace("-", " ")
            cities.append(City(place, region, float(latitude), float(longitude), int(weight)))
    return tuple(cities)


CITIES: Final = _read(_TABLE)
